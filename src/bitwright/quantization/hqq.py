"""Half-quadratic quantization (Badri, Shaji 2023): a grid that outliers pull less at, found from the weights alone.

The source is "Half-Quadratic Quantization of Large Machine Learning Models" (mobiusml.github.io/hqq_blog, 2023),
sections "Half-Quadratic Solver" (1) and (2): with W_r = (W_q - z) s,

    E <- shrink_p(W - W_r, beta) = sign(x) max(0, |x| - |x|^(p-1) / beta)
    z <- mean over the group of W_q - (W - E) / s,      beta <- kappa beta

Schemes without a float zero point have no z to move continuously. There the same half-quadratic problem is solved for
the scale instead, s <- <W - E, W_q - z> / <W_q - z, W_q - z>, and an integer zero point is z rounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.core import grid
from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.grid import Parameters
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme
from bitwright.quantization.concurrency import map_side_by_side
from bitwright.quantization.stages import Rounder, Stage
from bitwright.quantization.statistics import SiteStatistics

__all__ = ["HQQ", "HqqOptions", "solve_half_quadratic"]

TILE = 256 * 1024  # numbers worked on at a time: few enough for the cache, enough to pay for each operation's start
_Part = tuple[slice, slice, slice]  # rows, columns and groups of a tile
DENSE = 0.8  # groups that are settled are left out once fewer than this share still moves


@dataclass(frozen=True, slots=True, kw_only=True)
class HqqOptions:
    """How the half-quadratic problem is solved.

    Attributes:
        norm: p of the error's L_p norm, above 0 and at most 1.
        beta: weight of the quadratic term at the first iteration.
        kappa: factor of beta from one iteration to the next, at least 1. The paper has 1.01; the authors' own code
            leaves beta as it is, and so do we, by measurement.
        iterations: at most so many; a group whose grid no longer moves is finished before.
    """

    norm: float = 0.7
    beta: float = 10.0
    kappa: float = 1.0
    iterations: int = 20

    def __post_init__(self) -> None:
        _check("norm", self.norm, 0 < self.norm <= 1, "above 0 and at most 1")
        _check("beta", self.beta, 0 < self.beta < float("inf"), "a positive number")
        _check("kappa", self.kappa, 1 <= self.kappa < 2, "at least 1 and below 2")
        _check("iterations", self.iterations, self.iterations >= 0, "0 or more")


def solve_half_quadratic(
    weight: Tensor, statistics: SiteStatistics | None, scheme: QuantScheme, options: HqqOptions
) -> QuantizedTensor:
    """Quantize ``weight`` (``[out, in]``, any float dtype); ``statistics`` are not looked at.

    Per group the iterate of least squared error is kept: chosen by their L_p error, iterates cost more where it counts,
    in the model's predictions. The first is rounding to nearest, so no group is worse than that, before the scale and
    the zero point are rounded to how they are stored.

    Raises:
        BitwrightError: BW201 for schemes with a table of levels, whose codes are not counted; BW602 for a weight that
            is not finite.
    """
    if scheme.is_codebook:
        raise BitwrightError(
            "BW201",
            f"hqq cannot use {scheme.name}: the levels of {scheme.code} are a table and have no zero point to move",
            suggestion="an integer scheme, best with float zero points: w4g64-asym-fz",
        )
    weight = weight.detach()
    rows = weight if scheme.axis == 1 else weight.t().contiguous()
    fitted = grid.fit(rows, scheme=scheme)
    start, best = _Grids.copy(fitted), _Grids.copy(fitted)

    def work(part: _Part) -> None:
        lines, columns, groups = part
        values = rows[lines, columns].to(torch.float32)
        values = values.reshape((groups.stop - groups.start) * values.shape[0], -1)
        found = _improve(values, start.at(lines, groups), fitted.scale.dtype, scheme, options)
        best.scale[lines, groups] = found.scale.view(lines.stop - lines.start, -1)
        best.zero[lines, groups] = found.zero.view(lines.stop - lines.start, -1)

    tile = TILE if rows.device.type == "cpu" else max(TILE, rows.numel())
    map_side_by_side(work, list(_parts(rows.shape[0], rows.shape[1], scheme.group, tile)))
    zero = None if fitted.zero is None else best.zero.to(fitted.zero.dtype)
    return QuantizedTensor.encode(weight, scheme, Parameters(best.scale.to(fitted.scale.dtype), zero))


@dataclass(frozen=True, slots=True)
class _Grids:
    """Scale and zero point of some groups, float32: rounded to the dtype that they are stored in only at the end."""

    scale: Tensor
    zero: Tensor

    @staticmethod
    def copy(parameters: Parameters) -> _Grids:
        scale = parameters.scale.to(torch.float32, copy=True)
        zero = torch.zeros_like(scale) if parameters.zero is None else parameters.zero.to(torch.float32, copy=True)
        return _Grids(scale, zero)

    def at(self, lines: slice, groups: slice) -> _Grids:
        """Those of a tile, one group a row: ``[groups, 1]``."""
        return _Grids(self.scale[lines, groups].reshape(-1, 1), self.zero[lines, groups].reshape(-1, 1))


def _parts(rows: int, columns: int, group: int | None, tile: int) -> Iterator[_Part]:
    """Rows, columns and groups of tiles of at most ``tile`` numbers, or one group; shorter last groups apart."""
    size = max(1, columns if group is None else min(group, columns))
    full = columns // size
    span = max(1, min(full, tile // size))  # groups of one row that are worked on together
    lines = max(1, tile // (span * size))
    for first in range(0, rows, lines):
        part = slice(first, min(first + lines, rows))
        for start in range(0, full, span):
            end = min(start + span, full)
            yield part, slice(start * size, end * size), slice(start, end)
        if full * size < columns:
            yield part, slice(full * size, columns), slice(full, full + 1)


def _improve(values: Tensor, start: _Grids, dtype: torch.dtype, scheme: QuantScheme, options: HqqOptions) -> _Grids:
    """Iterate from ``start`` on groups ``values`` (``[groups, size]`` float32); the best grids seen."""
    scale, zero, norm = start.scale, start.zero, options.norm
    least = torch.full_like(scale, torch.inf)
    best_scale, best_zero = scale.clone(), zero.clone()
    moving: Tensor | slice = slice(None)  # which groups are still iterated on
    last_beta = options.beta * options.kappa**options.iterations
    for number in range(options.iterations + 1):
        scaled = values / _divisor(scale)
        position = _positions(scaled, zero, scheme)
        residual = torch.sub(position, scaled, out=scaled)  # -(W - W_r) / s
        beta = options.beta * options.kappa**number
        # The threshold of shrink_p falls as beta grows: below the last one, E is zero from here on.
        size = residual.abs()
        is_least_squares = float(size.amax() * scale.abs().amax()) ** (2 - norm) * last_beta <= 1
        target = residual if is_least_squares else _unshrunk(residual, size, scale, norm, beta)
        moved = _move(target, position, scale, zero, dtype, scheme)
        error = _error(size, scale)
        better = error < least[moving]
        least[moving] = torch.where(better, error, least[moving])
        best_scale[moving] = torch.where(better, scale, best_scale[moving])
        best_zero[moving] = torch.where(better, zero, best_zero[moving])
        if is_least_squares:  # then a grid that stays where it is will stay for good
            going = _has_moved(moved, scale, zero, torch.finfo(dtype).eps / 4).flatten().nonzero().flatten()
            if not len(going):
                break
            if len(going) < DENSE * len(values):
                moving = going if isinstance(moving, slice) else moving[going]
                values, moved = values[going], _Grids(moved.scale[going], moved.zero[going])
        scale, zero = moved.scale, moved.zero
    return _Grids(best_scale, best_zero)


def _has_moved(moved: _Grids, scale: Tensor, zero: Tensor, step: float) -> Tensor:
    """Whether grids have moved by more than ``step``, a quarter of what storing them can tell apart."""
    has_moved = (moved.scale - scale).abs() > step * scale.abs()
    return has_moved.logical_or_((moved.zero - zero).abs() > step * zero.abs().clamp_min_(1))


def _positions(scaled: Tensor, zero: Tensor, scheme: QuantScheme) -> Tensor:
    """What the nearest codes to ``scaled`` (``w / s``) are worth before they are multiplied by the scale: W_q - z."""
    if scheme.zero == "float":
        return torch.add(scaled, zero).round_().clamp_(scheme.code_min, scheme.code_max).sub_(zero)
    if scheme.symmetric and scheme.bits == 1:
        return scaled.floor().clamp_(-1, 0).mul_(2).add_(1)
    if scheme.symmetric:
        return scaled.round().clamp_(scheme.code_min, scheme.code_max)
    return scaled.round().add_(zero).clamp_(scheme.code_min, scheme.code_max).sub_(zero)


def _move(
    target: Tensor, position: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype, scheme: QuantScheme
) -> _Grids:
    """The next grids, within what ``dtype`` can store; ``target`` is ``W_q - z - (W - E) / s``."""
    if scheme.zero == "float":
        return _Grids(scale, zero + target.mean(1, keepdim=True))
    square = position.square().sum(1, keepdim=True)
    factor = 1 - (target * position).sum(1, keepdim=True) / _divisor(square)
    moved = scale * factor
    limits = torch.finfo(dtype)
    scale = torch.where((moved.abs() >= limits.tiny) & (moved.abs() <= limits.max), moved, scale)
    if not scheme.symmetric:
        zero = (zero + target.mean(1, keepdim=True)).round_().clamp_(scheme.code_min, scheme.code_max)
    return _Grids(scale, zero)


def _unshrunk(residual: Tensor, size: Tensor, scale: Tensor, norm: float, beta: float) -> Tensor:
    """``x - shrink_p(x)`` in units of the scale: ``sign(x) min(|x|, |x|^(p-1) / beta)`` for errors ``x``."""
    limit = size.pow(norm - 1).mul_(_divisor(scale).abs().pow(norm - 2) / beta)
    return torch.minimum(size, limit).copysign_(residual)


def _error(size: Tensor, scale: Tensor) -> Tensor:
    """The sum of ``(W - W_r)^2`` of each group, ``[groups, 1]``; ``size``, its ``|W - W_r| / s``, is overwritten."""
    return size.square_().sum(1, keepdim=True) * _divisor(scale).square()


def _divisor(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, 1.0, scale)


def _check(field: str, value: float, is_valid: bool, accepted: str) -> None:
    if not is_valid:
        raise ArgumentError("BW201", f"hqq option {field} is {value!r}", suggestion=f"accepted: {accepted}")


def _refuse(scheme: QuantScheme, options: HqqOptions) -> str | None:
    """Why there is no zero point to move, or ``None``."""
    return f"the levels of {scheme.code} are a table and have no zero point to move" if scheme.is_codebook else None


HQQ: Stage[Rounder] = Stage("hqq", HqqOptions, solve_half_quadratic, _refuse)
