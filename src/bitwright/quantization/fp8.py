"""Weights that are multiples of e4m3 numbers by one power of two, so that int4 codes can be unpacked into fp8.

The whole weight has a scale ``s8 = 2^ceil(log2(max|W| / 224))``, and is first rounded to fp8 through it. 224 = 7 * 32:
the largest symmetric int4 code on the largest step that then occurs; every level lies within it, half a step below the
240 that some fp8 units end at (the protective range). A level is ``s8 * s4 * (q - z)``, which is to be an e4m3 number
for every code: those have four significant bits, as many as the integers up to 15, so the step ``s4`` is a power of
two. Of the two next to the step that the group asks for, the one of less squared error is taken. The stored scale is
``s8 * s4``; whoever decodes such a tensor as usual gets exact e4m3 multiples, without knowing of fp8 at all.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bitwright.core import grid
from bitwright.core.errors import ArgumentError
from bitwright.core.grid import Parameters
from bitwright.core.scheme import QuantScheme

__all__ = ["LARGEST", "check_scheme", "code_limits", "fit_powers_of_two", "power_scale", "refuse_scheme", "through_fp8"]

LARGEST = 224.0
LEAST_STEP = 2.0**-9  # the smallest e4m3 number
TINIEST = 2.0**-117  # of the weight's scale, so that the smallest step stays a normal float32


def power_scale(weight: Tensor) -> float:
    """``s8``: the power of two by which ``weight`` fits into +-224; 1 for a weight of zeros."""
    largest = float(weight.abs().amax()) if weight.numel() else 0.0
    if largest == 0 or not math.isfinite(largest):
        return 1.0
    return max(TINIEST, 2.0 ** math.ceil(math.log2(largest / LARGEST)))


def through_fp8(weight: Tensor, scale: float) -> Tensor:
    """``weight`` (float32) rounded to e4m3 multiples of ``scale``: float32, a copy."""
    return (weight / scale).to(torch.float8_e4m3fn).to(torch.float32).mul_(scale)


def refuse_scheme(scheme: QuantScheme) -> str | None:
    """Why the levels of ``scheme`` cannot all be e4m3 numbers, or ``None``."""
    if scheme.is_codebook:
        return f"{scheme.code} has levels of its own"
    if scheme.bits > 4:
        return f"{scheme.bits}-bit codes have more digits than e4m3"
    if scheme.zero == "float":
        return "a float zero point moves levels between the e4m3 numbers"
    if scheme.scale_scheme is not None:
        return "rounded scales are no powers of two"
    return None


def check_scheme(scheme: QuantScheme) -> None:
    """Raise BW201 for a scheme whose levels cannot all be e4m3 numbers."""
    reason = refuse_scheme(scheme)
    if reason is not None:
        raise ArgumentError("BW201", f"fp8_aware does not go with {scheme.name}", why=reason, suggestion="w4g128")


def fit_powers_of_two(values: Tensor, parameters: Parameters, scheme: QuantScheme, weight_scale: float) -> Parameters:
    """Of the powers of two on either side of each fitted scale, the one of less squared error over the group.

    ``values`` and ``parameters`` are as :func:`bitwright.core.grid.fit` has them.
    """
    fitted = parameters.scale.to(torch.float32)
    exponent = torch.log2(fitted.abs().clamp(min=torch.finfo(torch.float32).tiny))
    best: tuple[Tensor, Parameters] | None = None
    for rounding in (torch.ceil, torch.floor):
        # A power of two is its own neighbour; rounding noise of log2 must not make it the next one.
        near = torch.where((exponent - exponent.round()).abs() < 1e-5, exponent.round(), rounding(exponent))
        scale = torch.exp2(near).clamp(LEAST_STEP * weight_scale, 32 * weight_scale)
        scale = torch.where(fitted == 0, 0.0, torch.copysign(scale, fitted))
        candidate = grid.rescale(parameters, scale, scheme)
        error = _squared_error(values, candidate, scheme, weight_scale)
        if best is None:
            best = (error, candidate)
        else:
            better = error < best[0]
            zero = best[1].zero
            if zero is not None and candidate.zero is not None:
                zero = torch.where(better, candidate.zero, zero)
            best = (error, Parameters(torch.where(better, candidate.scale, best[1].scale), zero))
    assert best is not None
    return Parameters(_stored(best[1].scale, scheme), best[1].zero)


def code_limits(scale: Tensor, zero: Tensor | None, scheme: QuantScheme, weight_scale: float) -> tuple[Tensor, Tensor]:
    """The least and the greatest code of each number that stays within +-224 ``weight_scale``; shapes as ``scale``."""
    reach = torch.floor(LARGEST * weight_scale / scale.abs().clamp(min=torch.finfo(torch.float32).tiny))
    middle = torch.zeros_like(scale) if zero is None else zero.to(torch.float32)
    return (middle - reach).clamp(min=scheme.code_min), (middle + reach).clamp(max=scheme.code_max)


def _squared_error(values: Tensor, parameters: Parameters, scheme: QuantScheme, weight_scale: float) -> Tensor:
    """Of each group, ``[rows, groups]``, in units of the weight's scale."""
    codes = grid.encode(values, parameters=parameters, scheme=scheme)
    error = (grid.decode(codes, parameters=parameters, scheme=scheme) - values.to(torch.float32)) / weight_scale
    columns = values.shape[1]
    starts = range(0, columns, scheme.group or columns)
    groups = [error[:, start : start + (scheme.group or columns)].square().sum(1) for start in starts]
    return torch.stack(groups, dim=1)


def _stored(scale: Tensor, scheme: QuantScheme) -> Tensor:
    """In the scheme's scale dtype, if every scale is a normal number there."""
    limits = torch.finfo(scheme.scale_dtype)
    sizes = scale[scale != 0].abs()
    fits = not sizes.numel() or (float(sizes.min()) >= limits.tiny and float(sizes.max()) <= limits.max)
    return scale.to(scheme.scale_dtype if fits else torch.float32)
