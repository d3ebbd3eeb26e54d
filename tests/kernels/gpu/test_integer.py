"""8-bit tokens: the integers, and where one program has a tile the results, are those of the reference kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitwright.core.scheme import DYNAMIC_INT8
from bitwright.core.scheme_names import parse
from bitwright.kernels import integer as reference_integer
from bitwright.kernels import reference
from bitwright.kernels.gpu import integer, launch, library
from bitwright.kernels.gpu.tokens import TokenLayout, norm_tokens, quantize_tokens, rms_norm
from bitwright.kernels.records import KernelSpec
from tests.kernels.gpu.compilation_facts import HOPPER, TURING, VOLTA
from tests.kernels.gpu.oracle import layer, relative_error

FEW = ("w8a8", "w4a8", "A8W4", "w4g32-a8", "w8g64-asym-a8")
MANY = ("A8W8", "w4g64-asym-a8", "w8g256-a8", "w4g512-asym-a8", "w8-asym-signed-a8", "w8g32-dq-a8", "w4g64-asym-fz-a8",
        "w8g64-asym-fz-a8", "w4g128-dq-a8")  # fmt: skip
SMALL = launch.LinearLaunch(block_n=16, block_m=16, split=1, warps=4, stages=1)


def check(name: str, *, shuffled: bool = False, rows: int = 3, out: int = 20, columns: int = 300) -> None:
    tensor, scheme = layer(name, out, columns, shuffled=shuffled)
    weight = integer.pack(tensor, scheme)
    x, bias = torch.randn(rows, columns), torch.randn(out)
    tokens = quantize_tokens(x, integer.token_layout(weight))
    expected = reference.run(x, reference.pack(tensor, scheme), bias)
    assert torch.equal(integer.multiply(tokens, weight, bias, x.dtype, chosen=SMALL), expected)
    cut = integer.multiply(tokens, weight, bias, x.dtype, chosen=replace(SMALL, split=3))
    assert relative_error(cut, expected.double()) < 1e-6
    assert tensor.group_count > 1 or torch.equal(cut, expected), "parts of one group are whole numbers"


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", FEW)
def test_results_are_bit_for_bit_the_reference_kernels(name: str) -> None:
    check(name)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", ["w8a8", "w8-asym-a8", "w8-asym-fz-a8", "w8-asym-signed-a8"])
@pytest.mark.parametrize("rows", [3, 40])  # fewer than the vendor's product takes; more than a program's
def test_the_vendors_products_are_scaled_to_the_reference_kernels_results(
    name: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor, scheme = layer(name, 200, 300)
    weight, x, bias = integer.pack(tensor, scheme), torch.randn(rows, 300), torch.randn(200)
    sizes, multiply = [], torch._int_mm
    monkeypatch.setattr(integer, "_is_dense", lambda *_: True)
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: sizes.append((len(a), b.shape[1])) or multiply(a, b))
    for given in (None, bias):
        expected = reference.run(x, reference.pack(tensor, scheme), given)
        sizes.clear()  # the reference kernel takes the same product
        assert torch.equal(integer.run(x, weight, given), expected)
        with monkeypatch.context() as small:  # features are shared out, the last part smaller
            small.setattr(integer, "PRODUCTS", 0)
            small.setattr(integer, "FEATURES", 100)
            assert torch.equal(integer.run(x, weight, given), expected)
        taken = max(rows, launch.FEW_ROWS + 1)
        assert sizes == [(taken, 200), (taken, 128), (taken, 72)]


@pytest.mark.usefixtures("interpreted")
def test_parts_of_groups_differ_from_the_reference_by_the_rounding_of_their_sums_alone() -> None:
    tensor, scheme = layer("w4g64-a8", 24, 1100)
    weight, x = integer.pack(tensor, scheme), torch.randn(20, 1100)  # more rows than a few: split all the same
    tokens = quantize_tokens(x, integer.token_layout(weight))
    found, whole = (integer.multiply(tokens, weight, None, x.dtype, chosen=chosen) for chosen in (None, SMALL))
    assert torch.equal(whole, reference.run(x, reference.pack(tensor, scheme)))
    numbers = tokens.codes[:, :1100].double() * tokens.scale[:, None].double()
    sizes = numbers.abs() @ tensor.dequantize().double().abs().t()
    bound = 2 * tensor.group_count * 2.0**-24 * sizes  # each order of sums rounds once a group (Higham 2002, 4.2)
    assert ((found.double() - whole.double()).abs() <= bound).all() and not torch.equal(found, whole)


@pytest.mark.usefixtures("interpreted")
def test_a_row_does_not_depend_on_its_neighbours_where_that_is_asked_for() -> None:
    tensor, scheme = layer("w4g32-a8", 24, 600)
    weight, x = integer.pack(tensor, scheme), torch.randn(18, 600)
    together = integer.run(x, weight, invariant=True)
    assert torch.equal(integer.run(x[7:8], weight, invariant=True), together[7:8])


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", [*FEW, *MANY])
def test_results_of_every_scheme_and_size(name: str) -> None:
    check(name, rows=int(torch.randint(1, 40, ())), out=int(torch.randint(1, 70, ())),
          columns=int(torch.randint(40, 1200, ())))  # fmt: skip
    if parse(name).weight.group is not None and parse(name).weight.scale_scheme is None:
        check(name, shuffled=True, columns=640)


@pytest.mark.usefixtures("interpreted")
def test_tokens_are_those_of_the_reference_also_where_scales_are_special() -> None:
    x = torch.randn(9, 150) * torch.logspace(-30, 30, 9)[:, None]
    x[1], x[2], x[3] = 0.0, -0.75, 1e-41
    x[4, 3:] = 0.0
    found = quantize_tokens(x, TokenLayout(slots=160, present=150, group=32, groups=5))
    expected = reference_integer.quantize_tokens(x, DYNAMIC_INT8)
    assert torch.equal(found.codes[:, :150], expected.codes) and not found.codes[:, 150:].any()
    assert torch.equal(found.scale, expected.scale[:, 0])
    assert torch.equal(found.sums, found.codes.view(9, 5, 32).sum(2, dtype=torch.int32))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_token_that_is_not_finite_gives_nan_and_spoils_no_other(value: float) -> None:
    tensor, scheme = layer("w8a8", 4, 40)
    x = torch.randn(2, 40)
    x[1, 7] = value
    found = integer.run(x, integer.pack(tensor, scheme))
    assert found[0].isfinite().all() and found[1].isnan().all()


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_is_that_of_float64_and_its_codes_those_of_its_result(dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(3, 50).to(dtype), torch.randn(3, 50).to(dtype), torch.randn(50).to(dtype))
    y, total = rms_norm(x, weight, 1e-5, residual)
    assert torch.equal(total, x + residual)
    exact = total.double() * (total.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    assert relative_error(y, exact) < (1e-6 if dtype == torch.float32 else 3e-3)
    layout = TokenLayout(slots=128, present=50)
    fused, again = norm_tokens(x, weight, 1e-5, layout, residual)
    apart = quantize_tokens(y, layout)
    assert torch.equal(again, total) and torch.equal(fused.codes, apart.codes) and torch.equal(fused.scale, apart.scale)
    assert torch.equal(rms_norm(x, weight, 1e-5)[1], x)


@pytest.mark.parametrize("name", [*FEW, *MANY])
def test_unpacking_is_the_inverse_of_packing(name: str) -> None:
    for shuffled in (False, parse(name).weight.group is not None and parse(name).weight.scale_scheme is None):
        tensor, scheme = layer(name, 5, 520, shuffled=shuffled)
        found = integer.unpack(integer.pack(tensor, scheme))
        assert torch.equal(found.codes, tensor.codes) and found.scheme == tensor.scheme
        assert torch.equal(found.dequantize(), tensor.dequantize())
        assert (found.zero is None) == (tensor.zero is None) and (found.group_index is None) == (not shuffled)
        assert found.zero is None or (tensor.zero is not None and torch.equal(found.zero, tensor.zero))


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(name: str, facts: library.GpuFacts = HOPPER) -> str | None:
        monkeypatch.setattr(library, "missing", lambda: None)
        monkeypatch.setattr(library, "describe", lambda _device: facts)
        return integer.refuse(KernelSpec(scheme=parse(name), shape=(64, 256), device=torch.device("cuda")))

    assert refusal("w8a8") is None and refusal("w4g128-a8") is None and refusal("w8a8", TURING) is None
    needed = "4-bit codes or groups beside 8-bit activations; Tesla T4 has 7.5"
    assert refusal("w4a8", TURING) == refusal("w8g64-a8", TURING) == f"needs compute capability 8.0 for {needed}"
    assert refusal("w4g128") == "activations of int8 alone"
    assert refusal("w4g128-a8g128") == "activations of one scale a token, not of groups"
    assert refusal("w3g32-a8") == "weights of 4 or 8 bits, not of 3"
    assert refusal("w4g96-a8") == "groups of 96, not 32, 64, 128..."
    assert refusal("w8a8", VOLTA) == "needs compute capability 7.5 for int8 matrix units; Tesla V100 has 7.0"
