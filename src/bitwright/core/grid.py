"""The only quantization arithmetic of the project: fit a grid, encode numbers on it, decode them again.

Numbers come as ``[rows, columns]``; a group is ``scheme.group`` consecutive columns of one row (the last may be
shorter). Arithmetic is float32 whatever dtype comes in; rounding is half to even; codes are clamped. Scales are cast to
their stored dtype first and codes are found with the cast scale, so the error is that of what is stored.
``scheme.axis`` is not looked at here: :class:`bitwright.core.qtensor.QuantizedTensor` turns columns into rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitwright.core.codebook import FP8_MAX, decode_levels, encode_levels
from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.memory import use_huge_pages
from bitwright.core.scheme import QuantScheme

__all__ = ["FitOptions", "Loops", "Parameters", "Range", "decode", "encode", "fit", "rescale", "row_tiles", "use_loops"]

FLOAT32 = torch.finfo(torch.float32)
Range = Literal["restricted", "full", "centred", "either"]
RANGES = ("restricted", "full", "centred", "either")
TILE = 1 << 18  # numbers worked on at a time, so that the float32 copies stay in cache


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """How a range is chosen; the stored format does not depend on it.

    Attributes:
        symmetric_range: ``restricted``: scale = max|w| / (2^(b-1)-1); ``full``: max|w| / 2^(b-1) with the sign that
            puts the extreme value on the lowest code; ``centred``: max|w| / ((2^b-1)/2), as compressed-tensors presets;
            ``either``: of restricted and full the one of least squared error, group by group. Symmetric integer schemes
            of 2 bits and more alone have a choice.
        search: try ranges shrunk by each of ``SHRINK_RATIOS`` and keep, per group, the one of least squared error
            (weighted by the importance of the columns where :func:`fit` is given one).
    """

    symmetric_range: Range = "restricted"
    search: bool = False

    def __post_init__(self) -> None:
        if self.symmetric_range not in RANGES:
            accepted = f"accepted: {', '.join(RANGES)}"
            raise ArgumentError("BW201", f"symmetric_range is {self.symmetric_range!r}", suggestion=accepted)

    def refuse(self, scheme: QuantScheme) -> str | None:
        """Why ``scheme`` cannot take the range, or ``None``."""
        has_choice = scheme.symmetric and not scheme.is_codebook and scheme.bits > 1
        if has_choice or self.symmetric_range in ("restricted", "either"):
            return None
        what = "says where a symmetric integer grid of two bits or more has its largest code"
        return f"range is {self.symmetric_range!r}, which {what}"


@dataclass(frozen=True, slots=True)
class Parameters:
    """The grid of each group: ``scale`` and ``zero`` (``None`` for symmetric schemes), both ``[rows, groups]``.

    ``scale`` has the scheme's scale dtype, or float32 where that would under- or overflow; ``zero`` has the code dtype
    (integer zero points) or the dtype of the scale (float ones).
    """

    scale: Tensor
    zero: Tensor | None


@dataclass(frozen=True, slots=True)
class Loops:
    """What goes over all numbers, by other means than torch, with the very results of the functions here.

    Attributes:
        accepts: whether it can work on these numbers (or codes) of a scheme, which are or become numbers of a dtype.
        ranges: from numbers and group size to the least and the greatest of each group, or ``None`` for the functions
            here to look.
        encode: from numbers, scales, zero points, group size and scheme to codes.
        decode: from codes, scales, zero points, group size, scheme and dtype to numbers.
    """

    accepts: Callable[[Tensor, QuantScheme, torch.dtype], bool]
    ranges: Callable[[Tensor, int], tuple[Tensor, Tensor] | None]
    encode: Callable[[Tensor, Tensor, Tensor | None, int, QuantScheme], Tensor]
    decode: Callable[[Tensor, Tensor, Tensor | None, int, QuantScheme, torch.dtype], Tensor]


_loops: list[Loops] = []


def use_loops(loops: Loops) -> None:
    """Have ``loops`` asked first from now on."""
    _loops.insert(0, loops)


# 1 comes first, so a search is never worse than none: a later ratio must be strictly better.
SHRINK_RATIOS = tuple(1.0 - 0.02 * step for step in range(36))


def fit(
    values: Tensor, *, scheme: QuantScheme, options: FitOptions | None = None, importance: Tensor | None = None
) -> Parameters:
    """Choose a grid for each group of ``values`` (``[rows, columns]``, any float dtype).

    ``importance`` (``[columns]``, >= 0; for instance the diagonal of a Hessian) weighs the squared error of each column
    where ``options.search`` is set, and is not looked at otherwise. Only its ratios within a group matter.

    Raises:
        ArgumentError: BW201 if the importance has another shape, or a number that is negative or not finite.
        BitwrightError: BW602 if a value is not finite.
    """
    options = options or FitOptions()
    low, high, size = _ranges(values, scheme)
    if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
        suggestion = "look for NaN and infinity in the weights, or in what the layer reads; no scale covers them"
        raise BitwrightError("BW602", "NaN or infinity among the values to quantize", suggestion=suggestion)
    if scheme.zero == "float":
        low, high = _with_near_zero(low, high, scheme)
    kinds = _kinds(scheme, options)
    scales = [_scale(low, high, size, scheme, kind) for kind in kinds]
    narrowest = [scale * SHRINK_RATIOS[-1] for scale in scales] if options.search else []
    dtype = _stored_dtype(torch.cat([*scales, *narrowest]), scheme)
    if not options.search and len(kinds) == 1:
        return Parameters(scales[0].to(dtype), _zero(low, high, scales[0].to(dtype), scheme))
    weights = None if importance is None or not options.search else _column_weights(importance, values, scheme)
    candidates = [(kind, ratio) for ratio in (SHRINK_RATIOS if options.search else (1.0,)) for kind in kinds]
    return _search(values, low, high, size, dtype, scheme, candidates, weights)


def encode(values: Tensor, *, parameters: Parameters, scheme: QuantScheme) -> Tensor:
    """Codes of ``values`` (``[rows, columns]``) on the grid ``parameters``: same shape, the scheme's code dtype."""
    for loops in _loops:
        if loops.accepts(values, scheme, values.dtype):
            return loops.encode(values, parameters.scale, parameters.zero, _group_size(values, scheme.group), scheme)
    codes = use_huge_pages(torch.empty(values.shape, dtype=scheme.code_dtype, device=values.device))
    for rows in row_tiles(values):
        tile = values[rows].to(torch.float32)
        for columns, groups, view in _group_views(tile, scheme.group):
            scale = parameters.scale[rows, groups].to(torch.float32).unsqueeze(-1)
            zero = None if parameters.zero is None else parameters.zero[rows, groups].to(torch.float32).unsqueeze(-1)
            codes[rows, columns].view(view.shape).copy_(_encode_groups(view, scale, zero, scheme))
    return codes


def decode(codes: Tensor, *, parameters: Parameters, scheme: QuantScheme, dtype: torch.dtype = torch.float32) -> Tensor:
    """The numbers (``dtype``, computed in float32) that ``codes`` (``[rows, columns]``) stand for."""
    for loops in _loops:
        if codes.dtype == scheme.code_dtype and loops.accepts(codes, scheme, dtype):
            size = _group_size(codes, scheme.group)
            return loops.decode(codes, parameters.scale, parameters.zero, size, scheme, dtype)
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for rows in row_tiles(codes):
        for columns, groups, view in _group_views(codes[rows], scheme.group):
            scale = parameters.scale[rows, groups].to(torch.float32).unsqueeze(-1)
            zero = None if parameters.zero is None else parameters.zero[rows, groups].to(torch.float32).unsqueeze(-1)
            values[rows, columns].view(view.shape).copy_(_positions(view, zero, scheme).mul_(scale))
    return values


def rescale(parameters: Parameters, scale: Tensor, scheme: QuantScheme) -> Parameters:
    """The same ranges on other scales (``[rows, groups]``): integer zero points move to where the old lows now lie."""
    if parameters.zero is None or scheme.zero == "float":
        return Parameters(scale, parameters.zero)
    low = (scheme.code_min - parameters.zero.to(torch.float32)) * parameters.scale.to(torch.float32)
    return Parameters(scale, _zero(low, torch.full_like(low, torch.inf), scale, scheme))


def row_tiles(values: Tensor) -> Iterator[slice]:
    """Rows of ``values`` (``[rows, columns]``) whose float32 copies stay in cache while they are worked on."""
    rows = max(1, TILE // max(1, values.shape[1]))
    for start in range(0, values.shape[0], rows):
        yield slice(start, min(start + rows, values.shape[0]))


def _group_size(values: Tensor, group: int | None) -> int:
    return values.shape[1] if group is None else min(group, values.shape[1])


def _group_views(values: Tensor, group: int | None) -> Iterator[tuple[slice, slice, Tensor]]:
    """The full groups of ``values`` as ``[rows, groups, group]``, then the shorter last one, with where they lie."""
    rows, columns = values.shape
    size = _group_size(values, group)
    if size == 0:
        return
    full = columns // size
    yield slice(0, full * size), slice(0, full), values[:, : full * size].reshape(rows, full, size)
    if full * size < columns:
        yield slice(full * size, columns), slice(full, full + 1), values[:, full * size :].unsqueeze(1)


def _ranges(values: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor, Tensor]:
    """Least, greatest and mean absolute value (used by 1-bit grids alone) of each group: float32 ``[rows, groups]``."""
    for loops in _loops:
        if not loops.accepts(values, scheme, values.dtype):
            continue
        if (found := loops.ranges(values, _group_size(values, scheme.group))) is not None:
            return *found, found[1]
    pieces: list[list[Tensor]] = []
    for rows in row_tiles(values):
        tile = values[rows].to(torch.float32)
        views = [view for _, _, view in _group_views(tile, scheme.group)]
        low = torch.cat([view.amin(-1) for view in views], dim=1)
        high = torch.cat([view.amax(-1) for view in views], dim=1)
        mean = torch.cat([_mean_magnitude(view) for view in views], dim=1) if scheme.bits == 1 else high
        pieces.append([low, high, mean])
    low, high, mean = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return low, high, mean


def _mean_magnitude(values: Tensor) -> Tensor:
    """The mean absolute value along the last dimension, summed in float64: huge values would overflow float32."""
    return values.abs().mean(-1, dtype=torch.float64).to(torch.float32)


def _kinds(scheme: QuantScheme, options: FitOptions) -> tuple[Range, ...]:
    """The symmetric ranges to choose from."""
    if options.symmetric_range != "either":
        return (options.symmetric_range,)
    has_choice = scheme.symmetric and not scheme.is_codebook and scheme.bits > 1
    return ("restricted", "full") if has_choice else ("restricted",)


def _scale(low: Tensor, high: Tensor, mean: Tensor, scheme: QuantScheme, kind: Range) -> Tensor:
    """The float32 scale of each group. A constant group takes its own magnitude, so that it comes back exactly."""
    largest = torch.maximum(low.abs(), high.abs())
    if not scheme.symmetric:
        with_zero = (high.clamp(min=0), low.clamp(max=0)) if scheme.zero == "integer" else (high, low)
        steps = (1 << scheme.bits) - 1
        scale = (with_zero[0] / 2 - with_zero[1] / 2) / (steps / 2)  # halved: the difference of huge values overflows
    elif scheme.is_codebook:
        scale = largest / FP8_MAX if scheme.code == "fp8_e4m3" else largest
    elif scheme.bits == 1:
        scale = mean
    elif kind == "full":
        scale = torch.where(high > -low, -largest, largest) / -scheme.code_min
    elif kind == "centred":
        scale = largest / ((scheme.code_max - scheme.code_min) / 2)
    else:
        scale = largest / scheme.code_max
    # A scale below the normal numbers has lost its precision; the smallest normal one keeps |w - w'| <= scale / 2.
    scale = torch.where(scale.abs() < FLOAT32.tiny, FLOAT32.tiny * torch.where(scale < 0, -1.0, 1.0), scale)
    scale = torch.where((low == high) & (largest >= FLOAT32.tiny), largest, scale)
    return torch.where(largest == 0, 0.0, scale)


def _with_near_zero(low: Tensor, high: Tensor, scheme: QuantScheme) -> tuple[Tensor, Tensor]:
    """Ranges for float zero points, widened towards zero where they lie so far from it that their zero point, in its
    stored dtype, would be off by more than a quarter of a code (or overflow)."""
    reach = 1 / (2 * torch.finfo(scheme.scale_dtype).eps * ((1 << scheme.bits) - 1))  # the most ranges away from zero
    nearest = max(0.0, 1 - 1 / reach)
    constant = low == high  # has an exact grid of its own
    near_low = torch.minimum(low, high.clamp(min=0) * nearest)
    near_high = torch.maximum(high, low.clamp(max=0) * nearest)
    return torch.where(constant | (low <= 0), low, near_low), torch.where(constant | (high >= 0), high, near_high)


def _stored_dtype(scale: Tensor, scheme: QuantScheme) -> torch.dtype:
    """The scheme's scale dtype, or float32 where some scale lies outside its normal range."""
    limits = torch.finfo(scheme.scale_dtype)
    size = scale[scale != 0].abs()
    fits = size.numel() == 0 or (bool(size.min() >= limits.tiny) and bool(size.max() <= limits.max))
    return scheme.scale_dtype if fits else torch.float32


def _zero(low: Tensor, high: Tensor, scale: Tensor, scheme: QuantScheme) -> Tensor | None:
    """Zero points for a stored scale, or ``None`` for symmetric schemes."""
    if scheme.symmetric:
        return None
    if scheme.zero == "float":
        # zero_point = Q_min - F_min / scale, from the range itself: a rounded scale would move it off exact halves.
        # (Halved, the difference of huge values does not overflow.) A constant group sits one code beside its zero.
        steps = (1 << scheme.bits) - 1
        width = (high / 2 - low / 2).clamp(min=FLOAT32.tiny * steps / 2)  # as the scale is
        position = low / 2 / width * steps
        constant = (low < 0).to(torch.float32)
        return (scheme.code_min + torch.where(low == high, constant, -position)).to(scale.dtype)
    divisor = torch.where(scale == 0, 1.0, scale.to(torch.float32))
    zero = scheme.code_min + torch.round(-low.clamp(max=0) / divisor)
    return zero.clamp(scheme.code_min, scheme.code_max).to(scheme.code_dtype)


def _encode_groups(values: Tensor, scale: Tensor, zero: Tensor | None, scheme: QuantScheme) -> Tensor:
    """Codes of ``[..., groups, size]`` float32 values, those of whole numbers as float32 too.

    ``scale`` and ``zero`` are ``[..., groups, 1]`` float32.
    """
    scaled = values / torch.where(scale == 0, 1.0, scale)
    if scheme.is_codebook:
        return encode_levels(scaled, scheme.code)
    if scheme.symmetric and scheme.bits == 1:
        codes = scaled.floor_()
    elif scheme.zero == "float" and zero is not None:
        codes = scaled.add_(zero).round_()
    else:
        codes = scaled.round_()
        codes = codes if zero is None else codes.add_(zero)
    return codes.clamp_(scheme.code_min, scheme.code_max)


def _positions(codes: Tensor, zero: Tensor | None, scheme: QuantScheme) -> Tensor:
    """What each code is worth before it is multiplied by its scale (float32); float ``codes`` are overwritten."""
    if scheme.is_codebook:
        return decode_levels(codes, scheme.code)
    positions = codes.to(torch.float32)
    if scheme.symmetric and scheme.bits == 1:
        return positions.mul_(2).add_(1)  # two levels, -scale and +scale
    return positions if zero is None else positions.sub_(zero)


def _search(
    values: Tensor,
    low: Tensor,
    high: Tensor,
    mean: Tensor,
    dtype: torch.dtype,
    scheme: QuantScheme,
    candidates: list[tuple[Range, float]],
    weights: Tensor | None,
) -> Parameters:
    """Per group, the kind and shrinkage of the range with the least squared error; constant groups keep theirs, which
    is exact. The first of equals wins."""
    scale = _scale(low, high, mean, scheme, candidates[0][0]).to(dtype)
    zero = _zero(low, high, scale, scheme)
    least = _squared_error(values, Parameters(scale, zero), scheme, weights)
    for kind, ratio in candidates[1:]:
        factor = torch.where(low == high, 1.0, ratio)
        candidate = _scale(low * factor, high * factor, mean * factor, scheme, kind).to(dtype)
        candidate_zero = _zero(low * factor, high * factor, candidate, scheme)
        error = _squared_error(values, Parameters(candidate, candidate_zero), scheme, weights)
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, candidate, scale)
        if zero is not None and candidate_zero is not None:
            zero = torch.where(better, candidate_zero, zero)
    return Parameters(scale, zero)


def _column_weights(importance: Tensor, values: Tensor, scheme: QuantScheme) -> Tensor:
    """``importance`` in units of the greatest of its group (float32 ``[1, columns]``): exactly 1 where it is constant.

    A group without any importance weighs its columns alike.
    """
    shape = [values.shape[1]]
    row = importance.detach().to(values.device, torch.float32).unsqueeze(0)
    if list(importance.shape) != shape or not bool(((row >= 0) & row.isfinite()).all()):
        found = f"importance is {list(importance.shape)}, or not all of it is finite and >= 0"
        raise ArgumentError("BW201", found, suggestion=f"accepted: {shape}, finite float32 numbers >= 0")
    weights = torch.ones_like(row)
    for columns, _, view in _group_views(row, scheme.group):
        greatest = view.amax(-1, keepdim=True)
        weights[:, columns] = torch.where(greatest > 0, view / greatest, 1.0).flatten(1)
    return weights


def _squared_error(
    values: Tensor, parameters: Parameters, scheme: QuantScheme, weights: Tensor | None = None
) -> Tensor:
    """Sum of squared errors of each group, in units of its largest value: ``[rows, groups]``.

    ``weights`` (``[1, columns]``) multiplies the squared error of each column.
    """
    error = torch.empty(parameters.scale.shape, dtype=torch.float32, device=values.device)
    for rows in row_tiles(values):
        tile = values[rows].to(torch.float32)
        for columns, groups, view in _group_views(tile, scheme.group):
            scale = parameters.scale[rows, groups].to(torch.float32).unsqueeze(-1)
            zero = None if parameters.zero is None else parameters.zero[rows, groups].to(torch.float32).unsqueeze(-1)
            rebuilt = _positions(_encode_groups(view, scale, zero, scheme), zero, scheme).mul_(scale)
            largest = view.abs().amax(-1, keepdim=True).clamp(min=FLOAT32.tiny)  # or squares over- and underflow
            squares = rebuilt.sub_(view).div_(largest).square_()
            if weights is not None:
                squares.mul_(weights[:, columns].view(1, view.shape[1], -1))
            error[rows, groups] = squares.sum(-1)
    return error
