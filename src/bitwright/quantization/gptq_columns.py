"""The innermost loop of GPTQ: round one column after the other, and let the rest of the block make up for it.

Columns of the weight are rows here (``[columns, out]``), so that each is contiguous. This one function is what native
code can replace.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.core import grid
from bitwright.core.grid import Parameters
from bitwright.core.scheme import QuantScheme

__all__ = ["ColumnGrids", "round_columns"]

STRIP = 8  # columns updated one by one; those behind them in the block get all eight errors in one product
OUTPUTS = 4096  # outputs worked on at a time, so that a strip stays in cache and needs no second thread


@dataclass(frozen=True, slots=True)
class ColumnGrids:
    """The grid of every number of some columns (``[columns, out]``): what rounds them one at a time.

    Attributes:
        scale: float32, as stored.
        zero: float32, or ``None`` for symmetric schemes.
        low, high: narrower limits of the codes, where a number must stay within a range of its own.
    """

    scheme: QuantScheme
    scale: Tensor
    zero: Tensor | None
    low: Tensor | None = None
    high: Tensor | None = None

    def part(self, columns: slice, outputs: slice) -> ColumnGrids:
        pieces = (self.scale, self.zero, self.low, self.high)
        return ColumnGrids(self.scheme, *(None if piece is None else piece[columns, outputs] for piece in pieces))  # type: ignore[arg-type]


def round_columns(values: Tensor, inverse: Tensor, grids: ColumnGrids) -> tuple[Tensor, Tensor]:
    """Round columns in order, each error spread over the columns that follow.

    Args:
        values: ``[columns, out]`` float32, the updated weights; holds the errors ``(w - q) / U_cc`` afterwards.
        inverse: ``[columns, columns]``, the diagonal block of ``U``, upper triangular (Frantar et al. 2022, eq. 3).
        grids: on which each number is rounded.

    Returns:
        The codes (the scheme's code dtype) and what they stand for (float32), both ``[columns, out]``.
    """
    codes = torch.empty(values.shape, dtype=grids.scheme.code_dtype, device=values.device)
    rounded = torch.empty_like(values)
    diagonal = inverse.diagonal().tolist()
    width = values.shape[0]
    for first in range(0, values.shape[1], OUTPUTS):
        outputs = slice(first, min(first + OUTPUTS, values.shape[1]))
        for start in range(0, width, STRIP):
            end = min(start + STRIP, width)
            columns = slice(start, end)
            strip, part = values[columns, outputs].contiguous(), grids.part(columns, outputs)
            divisor = torch.where(part.scale == 0, 1.0, part.scale)
            for column in range(end - start):
                place, value = start + column, strip[column]
                code, result = codes[place, outputs], rounded[place, outputs]
                _round_one(value, divisor[column], part, column, code, result)
                value.sub_(result).div_(diagonal[place])
                if column + 1 < end - start:
                    strip[column + 1 :].addr_(inverse[place, place + 1 : end], value, alpha=-1)
            values[columns, outputs] = strip
            if end < width:
                values[end:, outputs].addmm_(inverse[columns, end:].t(), strip, alpha=-1)
    return codes, rounded


def _round_one(value: Tensor, divisor: Tensor, grids: ColumnGrids, column: int, codes: Tensor, rounded: Tensor) -> None:
    """Codes of one column (``[out]``) and what they stand for, written into ``codes`` and ``rounded``.

    Exactly what :func:`bitwright.core.grid.encode` and ``decode`` give. Grids of evenly spaced codes are worked on in
    place, a few instructions a number; all others go through those functions.
    """
    scheme, scale = grids.scheme, grids.scale[column]
    zero = None if grids.zero is None else grids.zero[column]
    if scheme.is_codebook or (scheme.symmetric and scheme.bits == 1):
        alone = replace(scheme, group=1, axis=1, scale_scheme=None)
        parameters = Parameters(scale.unsqueeze(1), None if zero is None else zero.unsqueeze(1))
        found = grid.encode(value.unsqueeze(1), parameters=parameters, scheme=alone)
        codes.copy_(found.squeeze(1))
        rounded.copy_(grid.decode(found, parameters=parameters, scheme=alone).squeeze(1))
        return
    torch.div(value, divisor, out=rounded)
    if zero is None:
        rounded.round_()
    elif scheme.zero == "float":
        rounded.add_(zero).round_()
    else:
        rounded.round_().add_(zero)
    if grids.low is not None and grids.high is not None:
        torch.clamp(rounded, grids.low[column], grids.high[column], out=rounded)
    else:
        rounded.clamp_(scheme.code_min, scheme.code_max)
    codes.copy_(rounded)
    if zero is not None:
        rounded.sub_(zero)
    rounded.mul_(scale)
