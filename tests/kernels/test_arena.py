"""Room in large pages: apart, aligned, as long as its tensor, and given back with the last of them."""

from __future__ import annotations

import copy
import gc
import itertools
import mmap
import threading

import pytest
import torch

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme
from bitwright.core.scheme_names import parse
from bitwright.kernels import arena as arenas
from bitwright.kernels import native, native_library
from bitwright.kernels.arena import LINE, PIECE, SMALLEST, Arena, shared_room
from bitwright.kernels.native_decoder import pack_floats


def test_rooms_are_apart_and_of_the_size_that_was_asked_for() -> None:
    sizes = [0, 1, SMALLEST - 1, SMALLEST, SMALLEST + 1, 3 * SMALLEST + 7, PIECE - SMALLEST, 2 * PIECE + 1, SMALLEST]
    for make in (Arena().room, Arena(apart=True).room, shared_room):
        rooms = [make(size) for size in sizes]
        for number, room in enumerate(rooms):
            assert room.dtype == torch.uint8
            assert room.shape == (sizes[number],)
            room.fill_(number)
        for number, room in enumerate(rooms):
            assert bool((room == number).all())
            assert room.numel() == 0 or room.data_ptr() % LINE == 0


def test_rooms_of_several_threads_are_apart() -> None:
    arena, rooms = Arena(), list[torch.Tensor]()

    def take() -> None:
        rooms.extend(arena.room(1000) for _ in range(500))

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    starts = sorted(room.data_ptr() for room in rooms)
    assert len(rooms) == 2000
    assert all(second - first >= 1000 for first, second in itertools.pairwise(starts))


def test_small_rooms_share_a_piece_that_lives_as_long_as_any_of_them() -> None:
    arena = Arena(apart=True)
    first, second = arena.room(SMALLEST - 1), arena.room(SMALLEST)
    assert second.data_ptr() == first.data_ptr() + SMALLEST
    piece = arena._piece
    del first
    gc.collect()
    assert piece() is not None
    second.fill_(7)
    assert int(second.sum()) == 7 * SMALLEST
    del second
    gc.collect()
    assert piece() is None
    assert int(arena.room(SMALLEST).fill_(1).sum()) == SMALLEST


def test_a_piece_outlives_its_arena_as_long_as_it_is_used() -> None:
    arena = Arena()
    first, second, piece = arena.room(100), arena.keep(torch.ones(5)), arena._piece
    del arena, first
    gc.collect()
    assert piece() is not None and int(second.sum()) == 5
    del second
    gc.collect()
    assert piece() is None


def test_a_copy_of_one_is_no_copy_of_all() -> None:
    arena = Arena(apart=True)
    kept = arena.keep(torch.arange(6.0).view(2, 3).t())
    assert torch.equal(kept, torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]])) and kept.is_contiguous()
    assert kept.untyped_storage().nbytes() == copy.deepcopy(kept).untyped_storage().nbytes() == 24
    assert arena.keep(torch.empty(0, 3, dtype=torch.float16)).shape == (0, 3)


def test_where_no_memory_can_be_mapped_there_is_room_nevertheless(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> mmap.mmap:
        raise OSError("none")

    monkeypatch.setattr(arenas, "_shared", Arena(apart=True))
    monkeypatch.setattr(mmap, "mmap", fail)
    assert shared_room(SMALLEST).shape == Arena().room(SMALLEST).shape == (SMALLEST,)


@pytest.mark.skipif(native_library.missing() is not None, reason="the native kernels are not built")
def test_operands_are_packed_where_their_caller_says() -> None:
    arena, weight = Arena(), torch.randn(100, 64)
    given: list[torch.Tensor] = []

    def room(size: int) -> torch.Tensor:
        given.append(arena.room(size).fill_(255))
        return given[-1]

    scheme = LayerScheme(weight=parse("w4g32").weight)
    tensor = QuantizedTensor.quantize(weight, scheme.weight)
    packed = native.pack(tensor, scheme, room)
    floats = pack_floats(weight, room)
    assert [packed.tensors["codes"].data_ptr(), floats.codes.data_ptr()] == [each.data_ptr() for each in given]
    assert torch.equal(packed.tensors["codes"], native.pack(tensor, scheme).tensors["codes"])
    assert torch.equal(floats.codes, pack_floats(weight).codes)
    assert torch.equal(native.unpack(packed).codes, tensor.codes)
