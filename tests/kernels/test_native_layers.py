"""Norms, gated activations and rotary positions against float64, on every instruction set of this processor."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse
from bitwright.kernels import native, native_library
from bitwright.kernels.native_layers import norm_linear, rms_norm, rotate, silu_multiply

pytestmark = pytest.mark.skipif(native_library.missing() is not None, reason="the native kernels are not built")

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = [(1, 16), (3, 896), (2, 5, 37), (1, 1), (0, 8), (40, 130)]


@pytest.fixture(params=native_library.instruction_sets() or ["none"], autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = native_library.instruction_set()
    native_library.use_instruction_set(request.param)
    yield request.param
    native_library.use_instruction_set(before)


def near(found: Tensor, exact: Tensor, slack: float = 1.0) -> None:
    """Rounded once: half a unit in the last place, and in float32 the rounding of what led there."""
    error = (found.double() - exact).abs()
    limit = exact.abs() * TOLERANCES[found.dtype] * slack + (2**-25 if found.dtype == torch.float16 else 1e-30)
    assert (error <= limit * 1.01).all(), f"{found.dtype}: {(error / limit).max()}, seed {torch.initial_seed()}"


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    for extra in (None, residual):
        y, total = rms_norm(x, weight, 1e-6, extra)
        expected = x if extra is None else x + extra
        assert torch.equal(total, expected)
        wide = expected.double()
        exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight.double()
        near(y, exact)


# (out, in): whole panels and blocks, neither, fewer than a vector, one column, the shape of a small model.
LINEAR_SHAPES = [(64, 64), (13, 70), (5, 9), (9, 1), (130, 896)]


@pytest.mark.parametrize(
    "name", ["w8a8", "w4g32-a8", "w4g32-asym-a8", "w4g32-a8g64", "w8-a8g32", "w4g32", "w8", "nf4g32"]
)
@pytest.mark.parametrize("shape", LINEAR_SHAPES)
def test_norm_linear_equals_its_two_steps_and_float64(name: str, shape: tuple[int, int]) -> None:
    scheme = parse(name)
    tensor = QuantizedTensor.quantize(torch.randn(shape), scheme.weight)
    packed, norm_weight, bias = native.pack(tensor, scheme), torch.randn(shape[1]), torch.randn(shape[0])
    for tokens in (1, 3, 6, 17):
        x, residual = torch.randn(tokens, shape[1]), torch.randn(tokens, shape[1])
        for extra in (None, residual):
            y, total = norm_linear(x, norm_weight, 1e-6, packed, bias, extra)
            normed, expected_total = rms_norm(x, norm_weight, 1e-6, extra)
            assert torch.equal(total, expected_total)
            assert torch.equal(y, native.run(normed, packed, bias))
            wide = total.double()
            exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm_weight.double()
            # Rounding to int8 moves a number by half a step, a 255th of the largest of its token at most.
            step = exact.abs().amax(-1, keepdim=True) * (0.501 / 127 if scheme.activation else 2e-6)
            weight = tensor.dequantize(torch.float64)
            limit = step * weight.abs().sum(1) + 1e-5 * (exact.abs() @ weight.abs().t() + 1)
            assert ((y.double() - exact @ weight.t() - bias.double()).abs() <= limit).all()


def test_norm_linear_of_what_is_not_finite() -> None:
    scheme = parse("w8a8")
    packed = native.pack(QuantizedTensor.quantize(torch.randn(20, 70), scheme.weight), scheme)
    for tokens in (1, 8):
        x = torch.randn(tokens, 70)
        x[-1, 3] = torch.nan
        with pytest.raises(BitwrightError, match="BW602"):
            norm_linear(x, torch.ones(70), 1e-6, packed)


def test_norm_linear_in_any_batch_and_on_any_threads() -> None:
    scheme = parse("w4g32-a8")
    packed = native.pack(QuantizedTensor.quantize(torch.randn(150, 96), scheme.weight), scheme)
    x, residual, weight = torch.randn(300, 96), torch.randn(300, 96), torch.randn(96)
    together, sums = norm_linear(x, weight, 1e-6, packed, None, residual)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            for size in (1, 4, 7, 250):
                y, total = norm_linear(x[9 : 9 + size], weight, 1e-6, packed, None, residual[9 : 9 + size])
                assert torch.equal(y, together[9 : 9 + size])
                assert torch.equal(total, sums[9 : 9 + size])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", SHAPES)
def test_silu_multiply(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up = (torch.randn(shape) * 6).to(dtype), torch.randn(shape).to(dtype)
    near(silu_multiply(gate, up), gate.double() * gate.double().sigmoid() * up.double())


def test_silu_of_extremes() -> None:
    gate = torch.tensor([-200.0, -88.0, -0.0, 0.0, 1e-30, 88.0, 200.0, torch.inf])
    y = silu_multiply(gate, torch.ones(8))
    assert y[5:].tolist() == [88.0, 200.0, torch.inf]
    assert (y[:2].abs() < 1e-30).all()
    assert y[2:4].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("shape", [(1, 1, 2), (5, 3, 64), (4, 2, 80), (2, 14, 128), (0, 2, 8)])
def test_rotate(dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    half = shape[2] // 2
    angles = torch.outer(torch.arange(11).double(), 10000.0 ** -(torch.arange(half).double() / half))
    positions = torch.randint(0, 11, shape[:1], dtype=torch.int32)
    x = torch.randn(shape).to(dtype)
    turned = rotate(x.clone(), angles.cos().float(), angles.sin().float(), positions)
    a, b = x.double().split(half, dim=2)
    cosine, sine = (t[positions.long()].unsqueeze(1).float().double() for t in (angles.cos(), angles.sin()))
    exact = torch.cat([a * cosine - b * sine, b * cosine + a * sine], dim=2)
    size = torch.cat([(a * cosine).abs() + (b * sine).abs(), (b * cosine).abs() + (a * sine).abs()], dim=2)
    limit = exact.abs() * TOLERANCES[dtype] + size * 3e-7 + 2**-24
    assert ((turned.double() - exact).abs() <= limit).all()


def test_rows_do_not_depend_on_their_batch() -> None:
    x, weight, up = torch.randn(300, 70), torch.randn(70), torch.randn(300, 70)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert torch.equal(rms_norm(x, weight, 1e-5)[0][7], rms_norm(x[7:8], weight, 1e-5)[0][0])
        assert torch.equal(silu_multiply(x, up)[299], silu_multiply(x[299:], up[299:])[0])
    finally:
        torch.set_num_threads(threads)


def test_what_does_not_fit_is_refused() -> None:
    x = torch.randn(4, 8)
    with pytest.raises(ArgumentError, match="weight"):
        rms_norm(x, torch.randn(9), 1e-6)
    with pytest.raises(ArgumentError, match="x and residual"):
        rms_norm(x, torch.randn(8), 1e-6, torch.randn(8, 4).t())
    packed = native.pack(QuantizedTensor.quantize(torch.randn(4, 8), parse("w8").weight), parse("w8"))
    for bad in (torch.randn(2, 9), torch.randn(2, 8).double()):
        with pytest.raises(ArgumentError, match="x and residual"):
            norm_linear(bad, torch.randn(8), 1e-6, packed)
    with pytest.raises(ArgumentError, match="bias"):
        norm_linear(x, torch.randn(8), 1e-6, packed, torch.randn(5))
    with pytest.raises(ArgumentError, match="gate and up"):
        silu_multiply(x, x.double())
    table = torch.ones(3, 4)
    for positions in (torch.tensor([3], dtype=torch.int32), torch.tensor([-1], dtype=torch.int32)):
        with pytest.raises(ValueError, match="out of range"):
            rotate(torch.randn(1, 2, 8), table, table, positions)
    with pytest.raises(ArgumentError, match="positions"):
        rotate(torch.randn(1, 2, 8), table, table, torch.tensor([1]))
    with pytest.raises(ArgumentError, match="cosine"):
        rotate(torch.randn(1, 2, 6), table, table, torch.tensor([1], dtype=torch.int32))
