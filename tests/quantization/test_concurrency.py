"""Layers side by side: the same results in the same order, one thread each, errors by the largest layer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from bitwright.core.errors import BitwrightError
from bitwright.quantization.api import quantize
from bitwright.quantization.concurrency import map_layers
from tests.quantization.tiny import digests, save_model

SIZES = {"small": 1, "large": 9, "middle": 5}


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_keep_their_order_and_the_threads_their_count(threads: int) -> None:
    seen: dict[str, tuple[int, bool]] = {}

    def work(name: str) -> str:
        seen[name] = torch.get_num_threads(), torch.is_grad_enabled()
        return name.upper()

    with torch.no_grad():
        assert list(map_layers(work, SIZES).items()) == [(name, name.upper()) for name in SIZES]
    assert set(seen.values()) == {(1, False)}
    assert torch.get_num_threads() == threads
    assert map_layers(work, {}) == {} and map_layers(work, {"one": 1}) == {"one": "ONE"}


def test_layers_are_worked_on_at_the_same_time(threads: int) -> None:
    together = threading.Barrier(threads)

    def meet(name: str) -> int:
        return together.wait(timeout=20)

    assert sorted(map_layers(meet, SIZES).values()) == ([0, 0, 0] if threads == 1 else [0, 1, 2])


def test_the_error_of_the_largest_layer_counts(threads: int) -> None:
    def fail(name: str) -> None:
        if name != "small":
            raise BitwrightError("BW602", name)

    with pytest.raises(BitwrightError, match="large"):
        map_layers(fail, {"small": 1, "large": 9, "middle": 5} if threads > 1 else {"small": 1, "large": 9})
    assert torch.get_num_threads() == threads


def test_a_run_on_several_threads_writes_the_same_bytes(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    for count in (1, 3):
        quantize(tmp_path / "model", tmp_path / str(count), scheme="w4g32", threads=count)
    assert digests(tmp_path / "1") == digests(tmp_path / "3")
