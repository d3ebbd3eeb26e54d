"""Products of e4m3 tokens against float64 on the very numbers that are multiplied."""

from __future__ import annotations

import pytest
import torch

from bitwright.core.codebook import encode_levels
from bitwright.kernels.gpu import fp8, library
from tests.kernels.gpu.compilation_facts import AMPERE, HOPPER
from tests.kernels.gpu.oracle import layer, relative_error


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
@pytest.mark.parametrize("name", ["fp8", "w4g32", "w4g128-asym", "w4"])
def test_products_are_those_of_float64(name: str) -> None:
    tensor, _ = layer(name, 20, 300)
    x, bias = torch.randn(3, 300), torch.randn(20)
    codes, scale = fp8.fp8_tokens(x, 512)
    seen = codes[:, :300].view(torch.float8_e4m3fn).double() * scale[:, None].double()
    exact = seen @ tensor.dequantize().double().t() + bias.double()
    assert relative_error(fp8.fp8_linear(x, fp8.pack_fp8(tensor), bias), exact) < 2e-3
    assert fp8.fp8_linear(x[:0], fp8.pack_fp8(tensor)).shape == (0, 20)


def test_refusals_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusal(name: str, facts: library.GpuFacts = HOPPER) -> str | None:
        monkeypatch.setattr(library, "missing", lambda: None)
        monkeypatch.setattr(library, "describe", lambda _device: facts)
        return fp8.refuse_fp8(layer(name, 4, 256)[0], torch.device("cuda"))

    assert refusal("fp8") is None and refusal("w4g32-asym") is None
    assert refusal("fp8", AMPERE) == "needs compute capability 8.9 for fp8 matrix units; NVIDIA A100 has 8.0"
    assert refusal("w8") == "neither e4m3 with a scale a row nor 4-bit codes with whole zero points"
    assert refusal("w4g48") == "groups of 48, not of a multiple of 32"
