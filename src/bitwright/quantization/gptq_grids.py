"""Where the grids come from on which GPTQ rounds: fitted to the original weights, or to the updated ones as they come.

Doubly quantized scales are groups of hundreds of numbers that run across rows and groups, so all of them must be known
before one is: such grids are fitted to the original weights, the scales are rounded, and codes are found on the rounded
scales.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bitwright.core import grid
from bitwright.core.grid import FitOptions, Parameters
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme
from bitwright.quantization.fp8 import code_limits, fit_powers_of_two
from bitwright.quantization.gptq_columns import ColumnGrids
from bitwright.quantization.gptq_order import Order

__all__ = ["FittedGrids", "Fitting", "FixedGrids", "join", "nearest"]


@dataclass(frozen=True, slots=True)
class Fitting:
    """How a range is chosen.

    Attributes:
        options: of the grid.
        is_weighted: weigh the squared error of each column by the diagonal of the Hessian.
        fp8_scale: of a weight that is to be a multiple of e4m3 numbers by this power of two; ``None`` otherwise.
    """

    options: FitOptions
    is_weighted: bool = False
    fp8_scale: float | None = None

    def fit(self, values: Tensor, scheme: QuantScheme, importance: Tensor | None) -> Parameters:
        """Grids for the groups of ``values`` (``[rows, columns]``, groups along the rows)."""
        weights = importance if self.is_weighted else None
        parameters = grid.fit(values, scheme=scheme, options=self.options, importance=weights)
        if self.fp8_scale is None:
            return parameters
        return fit_powers_of_two(values, parameters, scheme, self.fp8_scale)

    def columns(self, scheme: QuantScheme, scale: Tensor, zero: Tensor | None) -> ColumnGrids:
        """Grids of single numbers from stored parameters, all ``[columns, out]``."""
        scale = scale.to(torch.float32)
        zero = None if zero is None else zero.to(torch.float32)
        if self.fp8_scale is None:
            return ColumnGrids(scheme, scale, zero)
        return ColumnGrids(scheme, scale, zero, *code_limits(scale, zero, scheme, self.fp8_scale))


@dataclass(slots=True)
class FixedGrids:
    """Grids fitted to the original weights (``weight``, ``[out, in]`` float32), double quantization included."""

    scheme: QuantScheme
    fitting: Fitting
    stored: Tensor | QuantizedTensor
    scale: Tensor  # as stored, [groups, out], or [in, groups] along axis 0
    zero: Tensor | None
    group_of: Tensor  # of each place; along axis 0, the column
    outputs: int

    @staticmethod
    def fit(weight: Tensor, scheme: QuantScheme, fitting: Fitting, importance: Tensor, order: Order) -> FixedGrids:
        rows = weight if scheme.axis == 1 else weight.t().contiguous()
        parameters = fitting.fit(rows, scheme, importance if scheme.axis == 1 else None)
        stored: Tensor | QuantizedTensor = parameters.scale
        if scheme.scale_scheme is not None:
            flat = parameters.scale.to(torch.float32).reshape(1, -1)
            stored = QuantizedTensor.quantize(flat, scheme.scale_scheme)
            parameters = grid.rescale(parameters, stored.dequantize().view_as(parameters.scale), scheme)
        scale, zero = parameters.scale, parameters.zero
        places = torch.arange(weight.shape[1], device=weight.device) if order.columns is None else order.columns
        if scheme.axis == 0:
            stored = stored.t().contiguous() if isinstance(stored, Tensor) else stored
            return FixedGrids(scheme, fitting, stored, scale, zero, places, weight.shape[0])
        size = weight.shape[1] if scheme.group is None else scheme.group
        scale, zero = scale.t().contiguous(), None if zero is None else zero.t().contiguous()
        return FixedGrids(scheme, fitting, stored, scale, zero, places // size, weight.shape[0])

    def at(self, start: int, end: int, outputs: slice) -> ColumnGrids:
        """The grids of the columns at some places, for some outputs."""
        groups = self.group_of[start:end]
        if self.scheme.axis == 0:
            scale = _along_outputs(self.scale[groups], self.scheme, self.outputs)[:, outputs]
            zero = (
                None if self.zero is None else _along_outputs(self.zero[groups], self.scheme, self.outputs)[:, outputs]
            )
            return self.fitting.columns(self.scheme, scale, zero)
        zero = None if self.zero is None else self.zero[:, outputs][groups]
        return self.fitting.columns(self.scheme, self.scale[:, outputs][groups], zero)

    def parameters(self) -> tuple[Tensor | QuantizedTensor, Tensor | None]:
        """Scales and zero points in the layout of a :class:`QuantizedTensor`."""
        return self.stored, None if self.zero is None else self.zero.t().contiguous()


@dataclass(slots=True)
class FittedGrids:
    """Grids fitted to updated weights, one group (along axis 0: one column) at a time."""

    scheme: QuantScheme
    fitting: Fitting
    count: int  # groups along axis 1, columns along axis 0
    found: dict[int, Parameters] = field(default_factory=dict)

    def fit(self, number: int, values: Tensor, importance: Tensor) -> ColumnGrids:
        """Fit group (or column) ``number`` to its updated weights (``[columns, out]``)."""
        if self.scheme.axis == 0:
            along = replace(self.scheme, axis=1, scale_scheme=None)
            found = self.fitting.fit(values, along, None)
            self.found[number] = Parameters(found.scale.t(), None if found.zero is None else found.zero.t())
            scale = _along_outputs(found.scale, self.scheme, values.shape[1])
            zero = None if found.zero is None else _along_outputs(found.zero, self.scheme, values.shape[1])
            return self.fitting.columns(self.scheme, scale, zero)
        whole = replace(self.scheme, group=None, scale_scheme=None)
        self.found[number] = self.fitting.fit(values.t().contiguous(), whole, importance)
        return self.at(number, values.shape[0])

    def at(self, number: int, columns: int) -> ColumnGrids:
        """The grids of some columns of group ``number``, which has been fitted."""
        scale, zero = self.found[number].scale, self.found[number].zero
        one = self.fitting.columns(self.scheme, scale.t().contiguous(), None if zero is None else zero.t().contiguous())
        pieces = (one.scale, one.zero, one.low, one.high)
        wide = (None if piece is None else piece.expand(columns, -1) for piece in pieces)
        return ColumnGrids(self.scheme, *wide)  # type: ignore[arg-type]

    def parameters(self) -> Parameters:
        """Scales and zero points of these outputs in the layout of a :class:`QuantizedTensor`."""
        return join([self.found[number] for number in range(self.count)], dim=1)


def join(parts: Sequence[Parameters], dim: int) -> Parameters:
    """Parameters side by side (``dim`` 1) or below each other; float32 if one scale needs that."""
    dtypes = {part.scale.dtype for part in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    scale = torch.cat([part.scale.to(dtype) for part in parts], dim=dim)
    zeros = [part.zero for part in parts if part.zero is not None]
    if not zeros:
        return Parameters(scale, None)
    return Parameters(
        scale, torch.cat([zero.to(dtype) if zero.is_floating_point() else zero for zero in zeros], dim=dim)
    )


def nearest(weight: Tensor, grids: FixedGrids) -> QuantizedTensor:
    """``weight`` (``[out, in]``, any float dtype) rounded to nearest."""
    scheme, (stored, zero) = grids.scheme, grids.parameters()
    by_rows = scheme.axis == 0  # as the grids lie; along axis 1 they are turned
    scale = grids.scale if by_rows else grids.scale.t().contiguous()
    points = grids.zero if by_rows else zero
    rows = weight.t().contiguous() if by_rows else weight
    codes = grid.encode(rows, parameters=Parameters(scale, points), scheme=scheme)
    if grids.fitting.fp8_scale is not None:
        low, high = code_limits(
            scale.to(torch.float32),
            None if points is None else points.to(torch.float32),
            scheme,
            grids.fitting.fp8_scale,
        )
        size = scheme.group or rows.shape[1]
        low, high = (limit.repeat_interleave(size, dim=1)[:, : rows.shape[1]] for limit in (low, high))
        codes = torch.clamp(codes, low, high).to(scheme.code_dtype)
    codes = codes.t().contiguous() if by_rows else codes
    return QuantizedTensor(scheme=scheme, codes=codes, scale=stored, zero=zero)


def _along_outputs(parameters: Tensor, scheme: QuantScheme, outputs: int) -> Tensor:
    """``[columns, groups]`` along axis 0 as ``[columns, out]``."""
    if scheme.group is None:
        return parameters.expand(-1, outputs)
    return parameters.repeat_interleave(scheme.group, dim=1)[:, :outputs]
