"""The table: order, reasons, and the reference at the end."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitwright.core.errors import BitwrightError, Notice
from bitwright.core.scheme_names import NAMED_SCHEMES, parse
from bitwright.kernels import reference, table
from bitwright.kernels.table import KERNELS, Kernel, KernelSpec, explain, select


def spec(name: str) -> KernelSpec:
    return KernelSpec(scheme=parse(name), shape=(64, 100), device=torch.device("cpu"))


@pytest.mark.parametrize("name", ["w1", "w4g7-asym-axis0", "nf4g64-dq", "fp8", *NAMED_SCHEMES])
def test_the_reference_is_last_and_accepts_everything(name: str) -> None:
    assert KERNELS[-1] is reference.KERNEL
    assert explain(spec(name))[-1] == ("reference", None)
    assert select(spec(name)).refuse(spec(name)) is None


def picky(name: str) -> Kernel:
    def refuse(asked: KernelSpec) -> str | None:
        return None if asked.scheme.weight.bits == 4 else "4 bits only"

    return replace(reference.KERNEL, name=name, refuse=refuse)


def test_the_first_that_accepts_is_chosen_and_refusals_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "KERNELS", (picky("fast"), reference.KERNEL))
    assert select(spec("w4")).name == "fast"
    assert select(spec("w8")).name == "reference"
    assert explain(spec("w8")) == [("fast", "4 bits only"), ("reference", None)]


def test_if_all_refuse_each_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "KERNELS", (picky("fast"), picky("faster")))
    with pytest.raises(BitwrightError, match=r"BW206.*w8(?s:.*)fast: 4 bits only; faster: 4 bits only") as caught:
        select(spec("w8"))
    assert "w4g128" in caught.value.suggestion
    monkeypatch.setattr(table, "KERNELS", ())
    with pytest.raises(BitwrightError, match="none of the usual schemes"):
        select(spec("w8"))


def test_a_layer_on_a_gpu_that_plain_torch_runs_is_told_of_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "KERNELS", (picky("fast"), reference.KERNEL))
    table._tell_once.cache_clear()
    on_gpu = replace(spec("w8a8"), device=torch.device("cuda"))
    with pytest.warns(Notice, match=r"no GPU kernel runs w8-sf32-a8; .*fast: 4 bits only"):
        assert select(on_gpu) is reference.KERNEL
    assert select(on_gpu) is reference.KERNEL  # a second warning would be an error
