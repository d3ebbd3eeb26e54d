"""The half-quadratic solver against its equations restated one group at a time in float64, and what it promises."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Literal

import pytest
import torch
from torch import Tensor

from bitwright.core import grid
from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme
from bitwright.quantization import hqq
from bitwright.quantization.hqq import HqqOptions, solve_half_quadratic

FLOAT_ZERO = QuantScheme(code="uint", symmetric=False, zero="float", group=16, scale_dtype=torch.float32)
INTEGER_ZERO = replace(FLOAT_ZERO, zero="integer")
SYMMETRIC = QuantScheme(group=16, scale_dtype=torch.float32)


def heavy_tailed(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Weights with the outliers that an error norm below 1 is made for."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(rows, columns, generator=generator)
    return 0.05 * values * (1 + 6 * (torch.rand(rows, columns, generator=generator) > 0.97))


def error(weight: Tensor, tensor: QuantizedTensor, norm: float = 0.7) -> float:
    return float((weight.double() - tensor.dequantize().double()).abs().pow(norm).sum())


def quantize(weight: Tensor, scheme: QuantScheme, **options: float) -> QuantizedTensor:
    return solve_half_quadratic(weight, None, scheme, HqqOptions(**options))  # type: ignore[arg-type]


def restated(group: list[float], scale: float, zero: float, top: int, options: HqqOptions) -> list[tuple[float, float]]:
    """Each iterate's zero point and error, number by number, as the paper writes them."""
    beta, seen = options.beta, []
    for _ in range(options.iterations + 1):
        codes = [min(max(round(w / scale + zero), 0), top) for w in group]
        rebuilt = [(q - zero) * scale for q in codes]
        errors = [w - r for w, r in zip(group, rebuilt, strict=True)]
        seen.append((zero, sum(x * x for x in errors)))
        shrunk = [
            math.copysign(max(0.0, abs(x) - abs(x) ** (options.norm - 1) / beta), x) if x else 0.0 for x in errors
        ]
        parts = zip(codes, group, shrunk, strict=True)
        zero = sum(q - (w - e) / scale for q, w, e in parts) / len(group)
        beta *= options.kappa
    return seen


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize(("size", "kappa"), [(1.0, 1.01), (40.0, 1.01), (10.0, 1.2), (1.5, 1.2)])
def test_the_zero_point_is_the_best_iterate_of_the_equations(bits: int, size: float, kappa: float) -> None:
    """``size`` makes errors fall on both sides of the threshold, 10^(-1/1.3) = 0.17 at first, below which E is zero."""
    scheme = replace(FLOAT_ZERO, bits=bits)
    weight, options = size * heavy_tailed(6, 48), HqqOptions(kappa=kappa)
    tensor = solve_half_quadratic(weight, None, scheme, options)
    start = grid.fit(weight, scheme=scheme)
    assert start.zero is not None and tensor.zero is not None
    for row in range(6):
        for number in range(3):
            columns = slice(16 * number, 16 * number + 16)
            group = weight[row, columns].double().tolist()
            scale, zero = float(start.scale[row, number]), float(start.zero[row, number])
            seen = restated(group, scale, zero, (1 << bits) - 1, options)
            best = min(found for _, found in seen)
            mine = (weight - tensor.dequantize())[row, columns].double().square().sum()
            assert float(mine) == pytest.approx(best, rel=1e-4)
            wanted = [zero for zero, found in seen if found < best * (1 + 1e-4)]
            assert min(abs(float(tensor.zero[row, number]) - zero) for zero in wanted) < 1e-3


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scheme", [FLOAT_ZERO, INTEGER_ZERO, SYMMETRIC], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("bits", range(1, 9))
def test_no_worse_than_rounding_to_nearest(scheme: QuantScheme, bits: int, axis: Literal[0, 1]) -> None:
    """W33, at every width along both axes, with a shorter last group, in the norm of the solver and squared."""
    scheme = replace(scheme, bits=bits, axis=axis, scale_dtype=torch.float16)
    weight = heavy_tailed(38, 70)
    nearest = QuantizedTensor.quantize(weight, replace(scheme, zero="integer"))
    tensor = quantize(weight, scheme)
    for norm in (2.0,) if scheme.symmetric else (2.0, 0.7):
        assert error(weight, tensor, norm) <= error(weight, nearest, norm) * (1 + 1e-6)
    if 2 <= bits <= 4 and scheme.zero == "float":
        assert error(weight, tensor) < 0.99 * error(weight, nearest)
    if scheme.zero == "integer" and not scheme.symmetric:
        assert tensor.zero is not None and tensor.zero.dtype == torch.uint8


@pytest.mark.parametrize("scheme", [FLOAT_ZERO, INTEGER_ZERO, SYMMETRIC], ids=lambda scheme: scheme.name)
def test_every_group_is_no_worse_also_far_from_zero(scheme: QuantScheme) -> None:
    weight = heavy_tailed(8, 64) + torch.linspace(-1, 1, 8).unsqueeze(1)
    nearest = QuantizedTensor.quantize(weight, replace(scheme, zero="integer"))
    mine, other = (
        (weight - tensor.dequantize()).square().view(8, 4, 16).sum(-1) for tensor in (quantize(weight, scheme), nearest)
    )
    assert (mine <= other * (1 + 1e-5)).all()


def test_the_scale_is_moved_by_least_squares_where_the_zero_point_cannot() -> None:
    """One step from the fitted scale, with all errors below the threshold of the shrinkage, so that E is zero."""
    weight = heavy_tailed(16, 16) * 0.1
    scale = grid.fit(weight, scheme=SYMMETRIC).scale.double()
    codes = (weight.double() / scale).round().clamp(-8, 7)
    moved = (weight.double() * codes).sum(1, keepdim=True) / codes.square().sum(1, keepdim=True)
    found = quantize(weight, SYMMETRIC, iterations=1)
    assert isinstance(found.scale, Tensor)
    is_moved = (found.scale.double() - moved).abs() < 1e-5 * moved
    is_kept = found.scale.double() == scale
    assert (is_moved | is_kept).all() and is_moved.any()


def test_scales_do_not_move_below_what_half_precision_holds() -> None:
    limits = torch.finfo(torch.float16)
    weight = heavy_tailed(16, 64)
    weight *= limits.tiny * 7 * 1.02 / weight.view(16, 4, 16).abs().amax(-1).repeat_interleave(16, 1)
    found = quantize(weight, replace(SYMMETRIC, scale_dtype=torch.float16))
    assert isinstance(found.scale, Tensor) and found.scale.dtype == torch.float16
    assert float(found.scale.abs().min()) >= limits.tiny
    smaller = quantize(weight, SYMMETRIC).scale
    assert isinstance(smaller, Tensor) and float(smaller.min()) < limits.tiny  # where there is room for it


@pytest.mark.parametrize("scheme", [FLOAT_ZERO, SYMMETRIC], ids=lambda scheme: scheme.name)
def test_more_iterations_are_never_worse(scheme: QuantScheme) -> None:
    weight = heavy_tailed(16, 64)
    errors = [error(weight, quantize(weight, scheme, iterations=count), 2.0) for count in (0, 1, 3, 20)]
    assert all(less <= more * (1 + 1e-6) for more, less in pairwise(errors))
    assert errors[-1] < errors[0]


@pytest.mark.parametrize("group", [16, 77, None])
def test_the_result_depends_on_neither_tiles_nor_threads(group: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, scheme = heavy_tailed(24, 200), replace(FLOAT_ZERO, group=group)
    before = torch.get_num_threads()
    whole = quantize(weight, scheme)
    monkeypatch.setattr(hqq, "TILE", 96)
    torch.set_num_threads(2)
    try:
        tiled = quantize(weight, scheme)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole.codes, tiled.codes)
    assert whole.zero is not None and tiled.zero is not None and torch.equal(whole.zero, tiled.zero)


def test_what_is_constant_comes_back_exactly() -> None:
    weight = torch.cat([torch.zeros(1, 32), torch.full((1, 32), 0.3), torch.full((1, 32), -2.5)])
    for scheme in (FLOAT_ZERO, INTEGER_ZERO, SYMMETRIC):
        assert torch.equal(quantize(weight, scheme).dequantize(), weight), scheme.name


def test_half_precision_weights_are_quantized_as_their_float32_values() -> None:
    weight = heavy_tailed(8, 64).to(torch.bfloat16)
    mine, other = quantize(weight, FLOAT_ZERO), quantize(weight.float(), FLOAT_ZERO)
    assert torch.equal(mine.codes, other.codes)


def test_scales_can_be_stored_as_integers() -> None:
    nested = QuantScheme(code="uint", bits=8, group=32, symmetric=False)
    tensor = quantize(heavy_tailed(16, 64), replace(INTEGER_ZERO, scale_scheme=nested))
    assert isinstance(tensor.scale, QuantizedTensor) and tensor.scale.codes.dtype == torch.uint8


def test_a_trainable_weight_is_taken_as_it_is() -> None:
    weight = torch.nn.Parameter(heavy_tailed(4, 32))
    assert quantize(weight, FLOAT_ZERO).codes.shape == (4, 32)


@pytest.mark.parametrize("code", ["nf4", "fp4_bnb"])
def test_tables_of_levels_are_refused(code: str) -> None:
    with pytest.raises(BitwrightError, match=r"BW201.*no zero point"):
        quantize(heavy_tailed(2, 16), QuantScheme(code=code, group=16))  # type: ignore[arg-type]


def test_weights_that_are_not_finite_are_refused() -> None:
    weight = heavy_tailed(2, 16)
    weight[1, 3] = torch.nan
    with pytest.raises(BitwrightError, match="BW602"):
        quantize(weight, FLOAT_ZERO)


@pytest.mark.parametrize(
    ("field", "value"), [("norm", 0.0), ("norm", 1.5), ("beta", -1.0), ("kappa", 0.9), ("iterations", -1)]
)
def test_options_out_of_range_are_named(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{field} is {value!r}"):
        HqqOptions(**{field: value})  # type: ignore[arg-type]
