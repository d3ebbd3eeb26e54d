"""Products by packed weights against float64: every scheme, odd sizes, any cut into programs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse
from bitwright.kernels.gpu import launch, library, linear
from bitwright.kernels.records import KernelSpec
from tests.kernels.gpu.compilation_facts import HOPPER, VOLTA
from tests.kernels.gpu.oracle import TOLERANCE, layer, relative_error

FEW = ("w4g32", "w4g64-asym", "w8g128", "w3g32", "nf4g64", "A16W4", "A16W8", "w4")
MANY = ("w1g32", "w2g64-asym", "w5g32", "w6g48-asym-fz", "w7", "fp8", "fp4g32", "fp4e2m1g32", "nf4g64-dq", "w2",
        "w4g32-sbf16", "w4g96-sf32", "w8-asym-signed", "w1g32-asym", "w4g256", "w3g128-asym-fz")  # fmt: skip
SMALL = launch.LinearLaunch(block_n=16, block_m=16, split=2, warps=4, stages=1)


def check(name: str, dtype: torch.dtype, *, out: int = 21, columns: int = 300, rows: int = 3, split: int = 2,
          shuffled: bool = False) -> None:  # fmt: skip
    tensor, scheme = layer(name, out, columns, shuffled=shuffled)
    weight = linear.pack(tensor, scheme)
    x, bias = torch.randn(rows, columns).to(dtype), torch.randn(out).to(dtype)
    exact = x.double() @ tensor.dequantize().double().t() + bias.double()
    found = linear.multiply(x, weight, bias, chosen=replace(SMALL, split=split))
    assert found.dtype == dtype and relative_error(found, exact) < TOLERANCE[dtype], name
    assert not weight.tensors["counters"].any(), "the next launch would miscount"
    torch.testing.assert_close(linear.expand(weight, 0, out, dtype), tensor.dequantize(dtype), rtol=1e-2, atol=1e-6)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", FEW)
def test_products_are_those_of_float64(name: str) -> None:
    check(name, torch.bfloat16 if name == "w4g32" else torch.float16)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", [*FEW, *MANY])
def test_products_of_every_scheme_and_dtype(name: str, dtype: torch.dtype) -> None:
    check(name, dtype, rows=int(torch.randint(1, 40, ())), split=int(torch.randint(1, 4, ())),
          out=int(torch.randint(1, 70, ())), columns=int(torch.randint(1, 1200, ())))  # fmt: skip


@pytest.mark.usefixtures("interpreted")
def test_columns_in_any_order() -> None:
    check("w4g32-asym", torch.float16, shuffled=True, columns=300)  # the last group has fewer, and empty slots


@pytest.mark.usefixtures("interpreted")
def test_a_row_does_not_depend_on_its_neighbours_where_that_is_asked_for() -> None:
    tensor, scheme = layer("w4g32", 40, 520)
    weight = linear.pack(tensor, scheme)
    x = torch.randn(20, 520)
    together = linear.multiply(x, weight, invariant=True)
    assert torch.equal(linear.multiply(x[7:8], weight, invariant=True), together[7:8])
    assert torch.equal(linear.multiply(x[3:20], weight, invariant=True), together[3:20])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", ["w8", "w4g32", "w3"])
def test_a_program_is_compiled_once_whatever_the_sizes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for whether columns are shared out: what it is compiled for holds no size, and no size of one is special."""
    compiled: set[tuple[tuple[str, object], ...]] = set()

    class Linear:
        def __getitem__(self, grid: object) -> object:
            return lambda *given, **named: compiled.add(tuple(named.items()))

    monkeypatch.setattr(library, "program", lambda _name: SimpleNamespace(linear=Linear()))
    for columns in (640, 1000, 2048):
        tensor, scheme = layer(name, 40, columns)
        weight = linear.pack(tensor, scheme)
        for rows, split in ((1, 1), (16, 1), (5, 2), (7, 5)):
            linear.multiply(torch.zeros(rows, columns), weight, chosen=replace(SMALL, split=split))
    assert len(compiled) == 2 and {dict(each)["IS_SPLIT"] for each in compiled} == {True, False}
    source = Path(linear.__file__).parent / "programs" / "linear.py"
    assert 'jit(do_not_specialize=["rows", "chunks", "groups", "chunks_each"])\ndef linear(' in source.read_text()


@pytest.mark.usefixtures("interpreted")
def test_many_rows_are_multiplied_by_the_expanded_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "LARGE_ROWS", 5)
    monkeypatch.setattr(linear, "EXPANDED", 16 * 130)
    tensor, scheme = layer("w4g64-asym", 40, 130)
    x, bias = torch.randn(2, 4, 130), torch.randn(40)
    found = linear.run(x, linear.pack(tensor, scheme), bias)
    assert relative_error(found, x.double() @ tensor.dequantize().double().t() + bias.double()) < 1e-6


@pytest.mark.parametrize("name", [*FEW, *MANY])
def test_unpacking_is_the_inverse_of_packing(name: str) -> None:
    for shuffled in (False, True):
        if shuffled and parse(name).weight.group is None:
            continue
        tensor, scheme = layer(name, 5, 130, shuffled=shuffled and parse(name).weight.scale_scheme is None)
        found = linear.unpack(linear.pack(tensor, scheme))
        assert torch.equal(found.codes, tensor.codes) and found.scheme == tensor.scheme
        assert torch.equal(found.dequantize(), tensor.dequantize())
        for field in ("zero", "group_index"):
            ours, theirs = getattr(found, field), getattr(tensor, field)
            assert (ours is None and theirs is None) or (torch.equal(ours, theirs) and ours.dtype == theirs.dtype)
        if isinstance(tensor.scale, QuantizedTensor):
            assert isinstance(found.scale, QuantizedTensor) and torch.equal(found.scale.codes, tensor.scale.codes)


def refusal(name: str, shape: tuple[int, int], device: str = "cuda") -> str | None:
    return linear.refuse(KernelSpec(scheme=parse(name), shape=shape, device=torch.device(device)))


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refusal("w4g128", (64, 64), "cpu") == "runs on an NVIDIA GPU, not on cpu"
    monkeypatch.setattr(library, "missing", lambda: "Triton is not installed")
    assert refusal("w4g128", (64, 64)) == "Triton is not installed"
    monkeypatch.setattr(library, "missing", lambda: None)
    monkeypatch.setattr(library, "describe", lambda _device: HOPPER)
    assert refusal("w4g128", (64, 256)) is None
    assert refusal("w4g48", (64, 256)) == "groups of 48, not of a multiple of 32"
    assert refusal("w3g48", (64, 256)) is None
    assert refusal("w4g48", (64, 40)) is None
    assert refusal("w4g32-axis0", (64, 64)) == "groups along axis 0"
    assert refusal("w4g32", (64, 0)) == "an empty weight"
    assert refusal("w8a8", (64, 64)) == "activations of 16 bits alone"
    monkeypatch.setattr(library, "describe", lambda _device: VOLTA)
    assert refusal("w4g128", (64, 256)) is None
    old = replace(VOLTA, name="P100", capability=(6, 0))
    monkeypatch.setattr(library, "describe", lambda _device: old)
    assert refusal("w4g128", (64, 256)) == "needs compute capability 7.0; P100 has 6.0"
