"""Room in large pages: apart, aligned, as long as its tensor, and given back with the last of them."""

from __future__ import annotations

import gc
import mmap
import weakref

import pytest
import torch

from bitwright.kernels import native_memory
from bitwright.kernels.native_memory import LINE, PIECE, SMALLEST, make_room

has_large_pages = pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="a system without large pages")


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_memory, "_last", [])


def test_rooms_are_apart_and_of_the_size_that_was_asked_for() -> None:
    sizes = [0, 1, SMALLEST - 1, SMALLEST, SMALLEST + 1, 3 * SMALLEST + 7, PIECE - SMALLEST, 2 * PIECE + 1, SMALLEST]
    rooms = [make_room(size) for size in sizes]
    for number, room in enumerate(rooms):
        assert room.dtype == torch.uint8
        assert room.shape == (sizes[number],)
        room.fill_(number)
    for number, room in enumerate(rooms):
        assert bool((room == number).all())
        assert room.numel() == 0 or room.data_ptr() % LINE == 0


@has_large_pages
def test_small_rooms_share_a_piece_that_lives_as_long_as_any_of_them() -> None:
    first, second = make_room(SMALLEST), make_room(SMALLEST)
    assert second.data_ptr() == first.data_ptr() + SMALLEST
    piece: weakref.ref[mmap.mmap] = native_memory._last[0][0]
    del first
    gc.collect()
    assert piece() is not None
    second.fill_(7)
    assert int(second.sum()) == 7 * SMALLEST
    del second
    gc.collect()
    assert piece() is None
    assert int(make_room(SMALLEST).fill_(1).sum()) == SMALLEST


@has_large_pages
def test_where_no_memory_can_be_mapped_there_is_room_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> mmap.mmap:
        raise OSError("none")

    monkeypatch.setattr(mmap, "mmap", fail)
    assert make_room(SMALLEST).shape == (SMALLEST,)
