"""Weights between float and integer: rounded as they will be stored, with gradients for what may still move.

Rounding and clamping have no useful derivative; the straight-through estimator (Bengio et al. 2013) lets a gradient
pass a rounding unchanged and stops it where a code is clamped. Two kinds of weight follow that rule. Both give, for the
gradient of the rounded weight, those of their own numbers, worked out by hand and by tiles of rows: autograd would keep
some ten copies of every weight.

- :class:`OffsetWeight` follows a float weight: ``q = clamp(round(w / s + v) + z)``, where the range of each group is
  the weight's own times two multipliers (SignRound, Cheng et al. 2023, equations 3 and 4).
- :class:`CodeWeight` starts from a quantized tensor: its codes and float zero points may be moved, its scales scaled.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.core import grid
from bitwright.core.grid import FitOptions, Parameters, row_tiles
from bitwright.core.memory import use_huge_pages
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme
from bitwright.kernels import native_grid

__all__ = ["CodeGradients", "CodeWeight", "Groups", "OffsetGradients", "OffsetWeight", "can_follow"]


@dataclass(frozen=True, slots=True)
class Groups:
    """Which columns of a row share a scale: runs of ``size`` (the last may be shorter), or what ``index`` says."""

    columns: int
    size: int
    index: Tensor | None = None

    @staticmethod
    def of(scheme: QuantScheme, columns: int, index: Tensor | None = None) -> Groups:
        """The groups of rows of ``columns`` numbers; ``index`` as in :class:`QuantizedTensor`."""
        size = max(1, columns) if scheme.group is None else min(scheme.group, max(1, columns))
        return Groups(columns, size, None if index is None else index.long())

    @property
    def count(self) -> int:
        return -(-self.columns // self.size)

    def split(self, values: Tensor) -> Tensor:
        """``[rows, columns]`` as ``[rows, groups, size]`` where all groups are full runs, else as it is; a view if the
        numbers lie in order."""
        return values.reshape(values.shape[0], -1, self.size) if self._is_even() else values

    def spread(self, values: Tensor) -> Tensor:
        """``[rows, groups]`` in a shape that goes with what :meth:`split` returns."""
        if self._is_even():
            return values.unsqueeze(-1)
        if self.index is not None:
            return values[:, self.index]
        wide = values.unsqueeze(-1).expand(-1, -1, self.size).reshape(values.shape[0], -1)
        return wide[:, : self.columns]

    def total(self, values: Tensor) -> Tensor:
        """The sums over each group (``[rows, groups]``) of what :meth:`split` returned."""
        if self._is_even():
            return values.sum(-1)
        rows = values.shape[0]
        if self.index is not None:
            return values.new_zeros(rows, self.count).index_add_(1, self.index, values)
        full = self.columns // self.size * self.size
        sums = values[:, :full].reshape(rows, -1, self.size).sum(-1)
        return sums if full == self.columns else torch.cat([sums, values[:, full:].sum(1, keepdim=True)], dim=1)

    def _is_even(self) -> bool:
        return self.index is None and self.columns % self.size == 0

    def extremes(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The least and the greatest number of each group (float32 ``[rows, groups]``), for runs of columns."""
        rows, full = values.shape[0], self.columns // self.size * self.size
        view = values[:, :full].reshape(rows, -1, self.size)
        low, high = view.amin(-1).to(torch.float32), view.amax(-1).to(torch.float32)
        if full == self.columns:
            return low, high
        tail = values[:, full:].to(torch.float32)
        return torch.cat([low, tail.amin(1, keepdim=True)], 1), torch.cat([high, tail.amax(1, keepdim=True)], 1)


@dataclass(frozen=True, slots=True)
class OffsetGradients:
    """``offset``: ``[rows, columns]``; ``low`` and ``high``: of the range multipliers, ``[rows, groups]``. float32."""

    offset: Tensor
    low: Tensor
    high: Tensor


@dataclass(frozen=True, slots=True)
class CodeGradients:
    """``position`` (``None`` where codes are frozen): ``[rows, columns]``; ``scale`` (of its multiplier) and ``zero``
    (``None`` unless a float zero point): ``[rows, groups]``. float32."""

    position: Tensor | None
    scale: Tensor
    zero: Tensor | None


def can_follow(scheme: QuantScheme) -> bool:
    """Whether :class:`OffsetWeight` knows the grid: integers of two or more bits, scales that are plain numbers."""
    plain = not scheme.is_codebook and scheme.scale_scheme is None and scheme.zero == "integer"
    return plain and not (scheme.symmetric and scheme.bits == 1)


class OffsetWeight:
    """A float weight, the offsets added to it before rounding, and the multipliers of its ranges.

    With offsets 0 and multipliers 1 it is exactly what :meth:`QuantizedTensor.quantize` makes of the weight.

    Attributes:
        offset: float32 ``[rows, columns]``, in codes; useful within [-0.5, 0.5].
        low, high: float32 ``[rows, groups]``: multipliers of the least and the greatest number of each group.

    Rows run along ``scheme.axis``: for axis 0 they are the columns of the weight ``[out, in]``.
    """

    def __init__(self, weight: Tensor, scheme: QuantScheme, fit: FitOptions | None = None) -> None:
        if not can_follow(scheme):
            raise ValueError(f"offsets cannot be learned on the grid of {scheme.name}")
        self.scheme, self.fit = scheme, fit or FitOptions()
        self.rows = weight.detach() if scheme.axis == 1 else weight.detach().t().contiguous()
        self.groups = Groups.of(scheme, self.rows.shape[1])
        self.start = grid.fit(self.rows, scheme=scheme, options=replace(self.fit, search=False))
        low, high = self.groups.extremes(self.rows)
        self.constant = low == high  # one repeated number, whose grid is exact by a rule of its own
        if not scheme.symmetric:
            low, high = low.clamp(max=0), high.clamp(min=0)
        self.lowest, self.highest = low, high
        self.offset = torch.zeros(self.rows.shape, dtype=torch.float32, device=self.rows.device)
        self.low, self.high = torch.ones_like(low), torch.ones_like(high)

    def decode(self, dtype: torch.dtype = torch.float32, into: Tensor | None = None) -> Tensor:
        """The weight as it would be stored, ``[out, in]``; ``into``: what this returned before, to be written over."""
        parameters = self.parameters()
        if self._is_native() and dtype == self.rows.dtype:
            room = use_huge_pages(torch.empty_like(self.rows)) if into is None else self._turned(into)
            scale, zero, group = parameters.scale, parameters.zero, self.groups.size
            return self._turned(native_grid.rounded(self.rows, scale, zero, group, self.scheme, self.offset, room))
        rounded = grid.decode(self._codes(parameters), parameters=parameters, scheme=self.scheme, dtype=dtype)
        return self._turned(rounded)

    def gradients(self, grad: Tensor) -> OffsetGradients:
        """From the gradient of the rounded weight (``[out, in]``) to those of offsets and multipliers."""
        grad = self._turned(grad)
        scale, zero = _as_float(self.parameters())
        offset = torch.empty(self.rows.shape, dtype=torch.float32, device=self.rows.device)
        scale_sums, zero_sums = torch.empty_like(scale), torch.zeros_like(scale)
        for rows in row_tiles(self.rows):
            scaled, codes, clamped = self._tile(rows, scale, zero)
            part = self.groups.split(grad[rows].to(torch.float32))
            centred = codes if zero is None else codes.sub_(self.groups.spread(zero[rows]))
            scale_sums[rows] = self.groups.total(centred.sub_(scaled.masked_fill_(clamped, 0.0)).mul_(part))
            part = torch.mul(part, self.groups.spread(scale[rows]), out=self.groups.split(offset[rows]))
            if zero is not None:  # a clamped code stays where it is when the zero point moves
                zero_sums[rows] = -self.groups.total(part * clamped)
            part.masked_fill_(clamped, 0.0)
        return OffsetGradients(offset, *self._range_gradients(scale_sums, zero_sums))

    def step(self, grad: Tensor, size: float) -> tuple[Tensor, Tensor]:
        """Move the offsets by ``size`` against the sign of their gradient, within [-0.5, 0.5].

        Returned are the gradients of the multipliers ``low`` and ``high``, of before the step.
        """
        rows = self._turned(grad)
        if self._is_native() and rows.dtype == self.rows.dtype and rows.is_contiguous():
            parameters = self.parameters()
            by_scale, by_zero = native_grid.step_offsets(
                self.rows, parameters.scale, parameters.zero, self.groups.size, self.scheme, self.offset, rows, size
            )
            return self._range_gradients(by_scale, by_zero)
        found = self.gradients(grad)
        self.offset.sub_(found.offset.sign_(), alpha=size).clamp_(-0.5, 0.5)
        return found.low, found.high

    def parameters(self) -> Parameters:
        """Scales and zero points in the dtypes in which they are stored."""
        scale, zero = self._grid(self.low, self.high)
        return Parameters(scale, None if zero is None else zero.to(self.scheme.code_dtype))

    def tensor(self, into: QuantizedTensor | None = None) -> QuantizedTensor:
        """The quantized tensor with the very codes, scales and zero points of :meth:`decode`.

        ``into``: what this returned before, whose codes may be written over.
        """
        parameters = self.parameters()
        codes = self._codes(parameters, into.codes if into is not None and self.scheme.axis == 1 else None)
        stored, points = parameters.scale, parameters.zero
        if self.scheme.axis == 0:
            codes, stored = codes.t().contiguous(), stored.t().contiguous()
            points = None if points is None else points.t().contiguous()
        return QuantizedTensor(scheme=self.scheme, codes=codes, scale=stored, zero=points)

    def _turned(self, weight: Tensor) -> Tensor:
        """``[out, in]`` as ``rows`` lie, and back."""
        return weight if self.scheme.axis == 1 else weight.t()

    def _is_native(self) -> bool:
        return native_grid.LOOPS.accepts(self.rows, self.scheme, self.rows.dtype)

    def _codes(self, parameters: Parameters, into: Tensor | None = None) -> Tensor:
        """The codes of all numbers, offsets added: ``[rows, columns]`` in the scheme's code dtype."""
        scale, zero = _as_float(parameters)
        if self._is_native():
            return native_grid.encode(self.rows, scale, zero, self.groups.size, self.scheme, self.offset, into)
        codes = torch.empty(self.rows.shape, dtype=self.scheme.code_dtype, device=self.rows.device)
        for rows in row_tiles(self.rows):
            self.groups.split(codes[rows]).copy_(self._tile(rows, scale, zero)[1])
        return codes

    def _tile(self, rows: slice, scale: Tensor, zero: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The numbers in units of their scales, their codes (float32), and whether a code was clamped: as split."""
        divisor = self.groups.spread(torch.where(scale[rows] == 0, 1.0, scale[rows]))
        scaled = self.groups.split(self.rows[rows]).to(torch.float32) / divisor
        free = (scaled + self.groups.split(self.offset[rows])).round_()
        if zero is not None:
            free += self.groups.spread(zero[rows])
        codes = free.clamp(self.scheme.code_min, self.scheme.code_max)
        return scaled, codes, codes != free

    def _grid(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor | None]:
        """Stored scales and zero points (not yet in their dtype) for multipliers; differentiable but for roundings."""
        lows, highs = self.lowest * low, self.highest * high
        constant = self.start.scale.to(torch.float32) * torch.where(self.lowest < 0, low, high)
        dtype = self.start.scale.dtype
        if self.scheme.symmetric:
            return torch.where(self.constant, constant, self._symmetric_scale(lows, highs)).to(dtype), None
        scale = (highs / 2 - lows / 2) / (((1 << self.scheme.bits) - 1) / 2)  # in the order of grid.fit, to be equal
        scale = torch.where(self.constant, constant, scale).to(dtype)
        divisor = torch.where(scale == 0, 1.0, scale.to(torch.float32))
        points = self.scheme.code_min + _round_through(-lows / divisor)
        return scale, points.clamp(self.scheme.code_min, self.scheme.code_max)

    def _symmetric_scale(self, lows: Tensor, highs: Tensor) -> Tensor:
        largest = torch.maximum(lows.abs(), highs.abs())
        if self.fit.symmetric_range == "full":
            return torch.where(self.highest > -self.lowest, -largest, largest) / -self.scheme.code_min
        if self.fit.symmetric_range == "centred":
            return largest / ((self.scheme.code_max - self.scheme.code_min) / 2)
        return largest / self.scheme.code_max

    def _range_gradients(self, scale_sums: Tensor, zero_sums: Tensor) -> tuple[Tensor, Tensor]:
        """Through scale and zero point to the multipliers; these are few, so autograd does it."""
        low, high = self.low.clone().requires_grad_(), self.high.clone().requires_grad_()
        with torch.enable_grad():
            scale, zero = self._grid(low, high)
            value = (scale.to(torch.float32) * scale_sums).sum()
            value = value if zero is None else value + (zero * zero_sums).sum()
            by_low, by_high = torch.autograd.grad(value, (low, high))
        return by_low, by_high


class CodeWeight:
    """A quantized tensor whose scales may be multiplied, and whose codes and float zero points may be moved.

    Attributes:
        position: float32 ``[rows, columns]``, rounded to codes; ``None``: the codes stay as they are, as those of
            tables of levels and of one symmetric bit do in any case.
        scale: float32 ``[rows, groups]``, multipliers of the scales; they stay 1 with double quantization.
        zero: float32 ``[rows, groups]``, added to float zero points; ``None`` for integer ones and none.
    """

    def __init__(self, tensor: QuantizedTensor, weight: Tensor | None = None, *, moving: bool = False) -> None:
        """``weight`` (``[out, in]``) is the float weight that moving codes are drawn to: the farther it lies from a
        code, the nearer to the boundary of its rounding does the position start."""
        self.base, scheme = tensor, tensor.scheme
        self.codes = tensor.codes if scheme.axis == 1 else tensor.codes.t().contiguous()
        self.groups = Groups.of(scheme, self.codes.shape[1], tensor.group_index)
        scale = tensor.dense_scale() if scheme.axis == 1 else tensor.dense_scale().t()
        self.start = scale.to(torch.float32).contiguous()
        point = tensor.zero if tensor.zero is None or scheme.axis == 1 else tensor.zero.t()
        self.point = None if point is None else point.to(torch.float32).contiguous()
        self.scale = torch.ones_like(self.start)
        self.zero = torch.zeros_like(self.start) if scheme.zero == "float" else None
        counted = not scheme.is_codebook and not (scheme.symmetric and scheme.bits == 1)
        self.position = self._positions(weight) if moving and counted else None

    def decode(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight as it would be stored, ``[out, in]``."""
        scale, zero = self._stored()
        rounded = torch.empty(self.codes.shape, dtype=dtype, device=self.codes.device)
        for rows in row_tiles(self.codes):
            worth = self._worth(self._codes(rows), None if zero is None else zero[rows])
            self.groups.split(rounded[rows]).copy_(worth.mul_(self.groups.spread(scale[rows])))
        return rounded if self.base.scheme.axis == 1 else rounded.t()

    def gradients(self, grad: Tensor) -> CodeGradients:
        """From the gradient of the rounded weight (``[out, in]``) to those of scales, zero points and positions."""
        grad = grad if self.base.scheme.axis == 1 else grad.t()
        scale, zero = self._stored()
        by_scale = torch.empty_like(self.start)
        by_zero = None if self.zero is None else torch.empty_like(self.start)
        by_position = None
        if self.position is not None:
            by_position = torch.empty(self.codes.shape, dtype=torch.float32, device=self.codes.device)
        for rows in row_tiles(self.codes):
            part = self.groups.split(grad[rows].to(torch.float32))
            worth = self._worth(self._codes(rows), None if zero is None else zero[rows])
            by_scale[rows] = self.groups.total(worth.mul_(part)) * self.start[rows]
            if by_zero is None and by_position is None:
                continue
            part = part * self.groups.spread(scale[rows])
            if by_zero is not None:
                by_zero[rows] = -self.groups.total(part)
            if by_position is not None:
                assert self.position is not None
                by_position[rows] = part.reshape(part.shape[0], -1) * self._inside(self.position[rows])
        return CodeGradients(by_position, by_scale, by_zero)

    def tensor(self) -> QuantizedTensor:
        """The quantized tensor with the very numbers of :meth:`decode`."""
        scheme, base = self.base.scheme, self.base
        codes = torch.cat([self._codes(rows) for rows in row_tiles(self.codes)]).to(scheme.code_dtype)
        scale, zero = base.scale, base.zero
        if isinstance(scale, Tensor):
            moved = self._stored()[0].to(scale.dtype)
            scale = moved if scheme.axis == 1 else moved.t().contiguous()
        if self.zero is not None and zero is not None:
            assert self.point is not None
            points = (self.point + self.zero).to(zero.dtype)
            zero = points if scheme.axis == 1 else points.t().contiguous()
        codes = codes if scheme.axis == 1 else codes.t().contiguous()
        return replace(base, codes=codes, scale=scale, zero=zero)

    def _positions(self, weight: Tensor | None) -> Tensor:
        """The codes, each moved towards where the float weight lies, by less than what would round to another code.

        A weight ``d`` codes away moves its position by ``d / (1 + |d|)``. Were it moved as far as it may, all the codes
        that error feedback took elsewhere would start side by side on their boundaries, and cross them in one step.
        """
        positions = self.codes.to(torch.float32)
        if weight is None:
            return positions
        target = weight.detach() if self.base.scheme.axis == 1 else weight.detach().t()
        scale, zero = self._stored()
        for rows in row_tiles(self.codes):
            divisor = self.groups.spread(torch.where(scale[rows] == 0, 1.0, scale[rows]))
            lies = self.groups.split(target[rows].to(torch.float32)) / divisor
            lies = lies if zero is None else lies + self.groups.spread(zero[rows])
            part = self.groups.split(positions[rows])
            away = lies - part
            part += (away / (1 + away.abs())).clamp_(-REACH, REACH)
        return positions

    def _stored(self) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points as float32 numbers, rounded as they are stored."""
        base = self.base.scale
        scale = self.start if not isinstance(base, Tensor) else (self.start * self.scale).to(base.dtype).float()
        if self.zero is None or self.point is None:
            return scale, self.point
        assert self.base.zero is not None
        return scale, (self.point + self.zero).to(self.base.zero.dtype).float()

    def _codes(self, rows: slice) -> Tensor:
        if self.position is None:
            return self.codes[rows]
        return self.position[rows].round().clamp_(self.base.scheme.code_min, self.base.scheme.code_max)

    def _worth(self, codes: Tensor, zero: Tensor | None) -> Tensor:
        """What codes are worth in units of their scales: float32, a fresh tensor, split."""
        scheme = self.base.scheme
        if scheme.is_codebook or (scheme.symmetric and scheme.bits == 1):
            unit = Parameters(torch.ones(codes.shape[0], 1, dtype=torch.float32, device=codes.device), None)
            plain = replace(scheme, group=None, scale_scheme=None, axis=1)
            worth = grid.decode(codes.to(scheme.code_dtype), parameters=unit, scheme=plain)
        else:
            worth = codes.to(torch.float32, copy=True)
        worth = self.groups.split(worth)
        return worth if zero is None else worth.sub_(self.groups.spread(zero))

    def _inside(self, position: Tensor) -> Tensor:
        """1 where a position rounds to a code by itself, 0 where it is clamped."""
        scheme = self.base.scheme
        free = position.round()
        return ((free >= scheme.code_min) & (free <= scheme.code_max)).to(torch.float32)


REACH = 0.49  # of a code; from 0.5 on, a position would round to the next one


def _as_float(parameters: Parameters) -> tuple[Tensor, Tensor | None]:
    zero = parameters.zero
    return parameters.scale.to(torch.float32), None if zero is None else zero.to(torch.float32)


def _round_through(values: Tensor) -> Tensor:
    """``values`` rounded, with the gradient of the identity."""
    return values + (torch.round(values) - values).detach()
