"""Products of e4m3 tokens against float64 on the very numbers that are multiplied, and against the reference kernel."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitwright.core.codebook import encode_levels
from bitwright.core.scheme_names import parse
from bitwright.kernels import reference
from bitwright.kernels.gpu import fp8, launch, library
from bitwright.kernels.records import KernelSpec
from tests.kernels.gpu.compilation_facts import AMPERE, HOPPER
from tests.kernels.gpu.oracle import layer, relative_error

NAMES = ("fp8-afp8", "w4g32-afp8", "w4g128-asym-afp8", "w4-afp8", "w4g64-dq-afp8", "w4g32-asym-signed-afp8")


@pytest.mark.usefixtures("interpreted")
def test_tokens_are_the_nearest_e4m3_numbers() -> None:
    x = torch.randn(5, 70) * torch.logspace(-6, 6, 5)[:, None]
    x[1, 3:] = 0.0
    x[2] *= torch.logspace(-4, 0, 70)  # down to the subnormal ones
    codes, scale = fp8.fp8_tokens(x, 128)
    expected = x.abs().amax(1) / 448.0
    assert torch.equal(scale, expected) and not codes[:, 70:].any()
    assert torch.equal(codes[:, :70], encode_levels(x / expected[:, None], "fp8_e4m3"))


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", NAMES)
def test_products_are_those_of_float64(name: str) -> None:
    tensor, scheme = layer(name, 20, 300)
    x, bias = torch.randn(3, 300), torch.randn(20)
    codes, scale = fp8.fp8_tokens(x, 512)
    seen = codes[:, :300].view(torch.float8_e4m3fn).double() * scale[:, None].double()
    exact = seen @ tensor.dequantize().double().t() + bias.double()
    weight = fp8.pack(tensor, scheme)
    found = fp8.run(x, weight, bias)
    assert relative_error(found, exact) < 2e-3
    assert relative_error(reference.run(x, reference.pack(tensor, scheme), bias), exact) < 1e-6
    assert fp8.run(x[:0], weight).shape == (0, 20)
    again = fp8.run(torch.stack([x, x]).to(torch.bfloat16), weight)
    assert again.dtype == torch.bfloat16 and again.shape == (2, 3, 20)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", ["fp8-afp8", "w4g32-asym-afp8"])
def test_columns_are_shared_by_programs_whose_parts_are_added_in_order(name: str) -> None:
    tensor, scheme = layer(name, 20, 1100)
    weight, x, bias = fp8.pack(tensor, scheme), torch.randn(3, 1100), torch.randn(20)
    tokens = fp8.fp8_tokens(x, 1280 if tensor.scheme.bits == 4 else 1152)
    one = launch.LinearLaunch(block_n=16, block_m=16, split=1, warps=4, stages=1)
    whole = fp8.multiply(tokens, weight, bias, torch.float32, chosen=one)
    for split in (2, 3, 16):  # also more than there are chunks, and a last part of fewer
        cut = fp8.multiply(tokens, weight, bias, torch.float32, chosen=replace(one, split=split))
        assert relative_error(cut, whole.double()) < 1e-6
        assert torch.equal(cut, fp8.multiply(tokens, weight, bias, torch.float32, chosen=replace(one, split=split)))
        assert not weight.tensors["counters"].any()


@pytest.mark.usefixtures("interpreted")
def test_a_row_does_not_depend_on_its_neighbours_where_that_is_asked_for() -> None:
    tensor, scheme = layer("w4g32-afp8", 24, 600)
    weight, x = fp8.pack(tensor, scheme), torch.randn(18, 600)
    together = fp8.run(x, weight, invariant=True)
    assert torch.equal(fp8.run(x[7:8], weight, invariant=True), together[7:8])


@pytest.mark.usefixtures("interpreted")
def test_columns_in_any_order() -> None:
    tensor, scheme = layer("w4g32-asym-afp8", 9, 300, shuffled=True)  # the last group has fewer, and empty slots
    x = torch.randn(2, 300)
    expected = reference.run(x, reference.pack(tensor, scheme))
    assert relative_error(fp8.run(x, fp8.pack(tensor, scheme)), expected.double()) < 2e-3


@pytest.mark.usefixtures("interpreted")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_a_token_that_is_not_finite_gives_nan_and_spoils_no_other() -> None:
    tensor, scheme = layer("fp8-afp8", 4, 40)
    x = torch.randn(2, 40)
    x[1, 7] = torch.inf
    for found in (fp8.run(x, fp8.pack(tensor, scheme)), reference.run(x, reference.pack(tensor, scheme))):
        assert found[0].isfinite().all() and found[1].isnan().all()


@pytest.mark.parametrize("name", NAMES)
def test_unpacking_is_the_inverse_of_packing(name: str) -> None:
    tensor, scheme = layer(name, 5, 200)
    found = fp8.unpack(fp8.pack(tensor, scheme))
    assert found.scheme == tensor.scheme and torch.equal(found.codes, tensor.codes)
    assert torch.equal(found.dequantize(), tensor.dequantize())
    with pytest.raises(ValueError, match="a w8 layer"):
        fp8.pack(tensor, parse("w8"))


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(name: str, facts: library.GpuFacts = HOPPER, columns: int = 256) -> str | None:
        monkeypatch.setattr(library, "missing", lambda: None)
        monkeypatch.setattr(library, "describe", lambda _device: facts)
        return fp8.refuse(KernelSpec(scheme=parse(name), shape=(4, columns), device=torch.device("cuda")))

    assert refusal("fp8-afp8") is refusal("w4g32-asym-afp8") is refusal("w4g48-afp8", HOPPER, 48) is None
    assert refusal("fp8-afp8", AMPERE) == "needs compute capability 8.9 for fp8 matrix units; NVIDIA A100 has 8.0"
    assert refusal("w8a8") == refusal("w4g128") == "activations of e4m3 alone"
    assert refusal("w4g48-afp8") == "groups of 48, not of a multiple of 32"
    assert refusal("fp8-dq-afp8") == "e4m3 codes with doubly quantized scales"
    assert refusal("w4-afp8", HOPPER, 1 << 17) == "more than 65536 input features"
