"""Which kernel runs a layer on which generation of GPUs, what is told where none does, and models without a GPU."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import bitwright
from bitwright.core.errors import Notice
from bitwright.core.scheme_names import parse
from bitwright.kernels import table
from bitwright.kernels.gpu import fp8, integer, library, linear
from bitwright.kernels.records import KernelSpec
from tests.kernels.gpu.compilation_facts import AMPERE, HOPPER, TURING, VOLTA
from tests.quantization.tiny import save_model

ALL, NONE = ("triton",) * 4, ("reference",) * 4
CHOICES = {  # on Volta, Turing, Ampere, Hopper
    **dict.fromkeys(("w4g128", "w4g32-asym", "w3g64", "w2g64-asym-fz", "w4", "A16W4", "A16W8", "nf4g64", "nf4g64-dq",
                     "fp4g32", "fp8"), ALL),
    **dict.fromkeys(("w8a8", "A8W8"), ("reference", "triton-int8", "triton-int8", "triton-int8")),
    **dict.fromkeys(("w4a8", "A8W4", "w4g128-a8", "w8g64-asym-a8"), ("reference",) * 2 + ("triton-int8",) * 2),
    **dict.fromkeys(("fp8-afp8", "w4g128-afp8", "w4g128-asym-afp8"), ("reference",) * 3 + ("triton-fp8",)),
    "w4g128-axis0": NONE,
}  # fmt: skip


def test_launches_go_to_the_gpu_that_the_operands_lie_on(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[Any] = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or nullcontext())
    run: Any = library.beside(lambda x, *more: (x.device, *more))
    for name in ("cpu", "cuda", "cuda:0", "cuda:1"):
        device = torch.device(name)
        assert run(SimpleNamespace(device=device), 2) == (device, 2)
    assert entered == [torch.device("cuda:1")]
    assert all(hasattr(kernel.run, "__wrapped__") for kernel in (linear.KERNEL, integer.KERNEL, fp8.KERNEL))


@pytest.mark.parametrize("name", CHOICES)
def test_every_generation_has_its_kernel_or_a_notice(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = KernelSpec(scheme=parse(name), shape=(64, 512), device=torch.device("cuda"))
    monkeypatch.setattr(library, "missing", lambda: None)
    for facts, expected in zip((VOLTA, TURING, AMPERE, HOPPER), CHOICES[name], strict=True):
        monkeypatch.setattr(library, "describe", lambda _device, facts=facts: facts)
        table._tell_once.cache_clear()
        if expected != "reference":
            assert table.select(spec).name == expected, facts.name
            continue
        with pytest.warns(Notice, match=r"no GPU kernel runs .*plain torch does, slowly \(triton: ") as told:
            assert table.select(spec).name == "reference"
        if "axis0" not in name:
            assert f"{facts.name} has {facts.capability[0]}.{facts.capability[1]}" in str(told[0].message)


def test_volta_says_what_its_matrix_units_lack(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "missing", lambda: None)
    monkeypatch.setattr(library, "describe", lambda _device: VOLTA)
    spec = KernelSpec(scheme=parse("w8a8"), shape=(64, 512), device=torch.device("cuda"))
    reasons = dict(table.explain(spec))
    assert reasons["triton-int8"] == "needs compute capability 7.5 for int8 matrix units; Tesla V100 has 7.0"
    assert reasons["reference"] is None


@pytest.mark.parametrize("scheme", ["fp8-afp8", "w4g32-afp8"])
def test_a_model_of_e4m3_activations_is_written_and_runs_anywhere(scheme: str, tmp_path: Path) -> None:
    save_model(tmp_path / "float", "llama")
    report = bitwright.quantize(tmp_path / "float", tmp_path / "out", scheme=scheme)
    assert report.format == "native"
    tokens = torch.arange(1, 25)[None]
    with torch.no_grad():
        exact, found = (bitwright.load(tmp_path / each)(input_ids=tokens).logits for each in ("float", "out"))
    error = float((found - exact).norm() / exact.norm())
    assert 1e-3 < error < (0.15 if scheme.startswith("fp8") else 0.5)
    layer = bitwright.load(tmp_path / "out").get_submodule("model.layers.0.mlp.up_proj")
    assert layer.scheme == parse(scheme)
