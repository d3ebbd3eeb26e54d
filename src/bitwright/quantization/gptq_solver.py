"""GPTQ over one weight: blocks of columns, each updated by all before it in one product, then rounded column by column.

The errors that earlier columns left reach a block all at once, when the block is come to: see
:mod:`bitwright.quantization.cholesky` for the equation. So nothing behind the block is written to, and the one product
a block needs is deep instead of wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.quantization.cholesky import invert_upper
from bitwright.quantization.gptq_columns import round_columns
from bitwright.quantization.gptq_grids import FittedGrids, FixedGrids
from bitwright.quantization.gptq_order import Order, Run
from bitwright.quantization.hessian import Factor
from bitwright.quantization.hessian_products import product

__all__ = ["Solved", "output_error", "solve"]

WIDE = 512  # columns multiplied at a time where nothing depends on their order


@dataclass(frozen=True, slots=True)
class Solved:
    """``codes`` (``[in, out]``, in the order of rounding) and the squared output error, ``tr(D H DT)``."""

    codes: Tensor
    error: float


@dataclass(frozen=True, slots=True)
class _Piece:
    """Places whose columns are rounded on grids that are known when the first of them is come to.

    ``run`` is the group to be fitted there, ``number`` whose grids to use.
    """

    start: int
    end: int
    number: int
    run: Run | None


def solve(
    weight: Tensor,
    factor: Factor,
    order: Order,
    grids: FixedGrids | FittedGrids,
    importance: Tensor,
    block_size: int,
    outputs: slice,
) -> Solved:
    """Round ``weight`` (``[in, outputs]`` float32, rows in the order of rounding; spoilt) to codes on ``grids``.

    ``importance`` (``[in]``, in that order) weighs columns where the grids' search asks for it; ``outputs`` are those
    of the whole weight, of which fixed grids know all.
    """
    scheme, upper = grids.scheme, factor.upper
    codes = torch.empty(weight.shape, dtype=scheme.code_dtype, device=weight.device)
    total = 0.0
    for pieces in _blocks(order, grids, weight.shape[0], block_size):
        start, end = pieces[0].start, pieces[-1].end
        inverse = invert_upper(upper[start:end, start:end])
        values = _updated(weight, upper, start, end, inverse)
        for piece in pieces:
            here, behind = slice(piece.start - start, piece.end - start), slice(piece.end - start, None)
            places = slice(piece.start, piece.end)
            if isinstance(grids, FixedGrids):
                known = grids.at(piece.start, piece.end, outputs)
            elif piece.run is None:
                known = grids.at(piece.number, piece.end - piece.start)
            else:
                run = slice(piece.run.start, piece.run.end)
                whole = values[here] if piece.run.end == piece.end else _updated(weight, upper, run.start, run.stop)
                known = grids.fit(piece.number, whole, importance[run])
                known = known if whole.shape[0] == piece.end - piece.start else known.part(here, slice(None))
            codes[places], rounded = round_columns(values[here], inverse[here, here], known)
            weight[places] -= rounded  # the change of these weights, from now on
            if piece.end < end:
                values[behind].addmm_(inverse[here, behind].t(), values[here], alpha=-1)
        total += _squares(values, factor, start, end) - factor.damping * _squares(weight[start:end], factor, start, end)
    return Solved(codes, max(0.0, total))


def output_error(change: Tensor, factor: Factor) -> float:
    """``tr(D H DT)`` of a change of the weights ``D`` (``[in, out]`` float32, rows in the order of the factor)."""
    total = 0.0
    for start in range(0, change.shape[0], WIDE):
        end = min(start + WIDE, change.shape[0])
        columns = _turned(factor.upper, end, start, end)
        columns[:, start:end].tril_()
        errors = product(columns, change[:end].t())
        total += _squares(errors, factor, start, end)
        total -= factor.damping * _squares(change[start:end], factor, start, end)
    return max(0.0, total)


def _squares(rows: Tensor, factor: Factor, start: int, end: int) -> float:
    """The sum of squares of the rows at some places, those of dead inputs left out."""
    sums = torch.linalg.vector_norm(rows, dim=1).to(torch.float64).square_()
    return float((sums if factor.live is None else sums[factor.live[start:end]]).sum())


def _updated(weight: Tensor, upper: Tensor, start: int, end: int, inverse: Tensor | None = None) -> Tensor:
    """The weights at some places, updated by the errors of all places before ``start``: ``[end - start, out]``."""
    if start == 0:
        return weight[:end].clone()
    inverse = invert_upper(upper[start:end, start:end]) if inverse is None else inverse
    carried = product(_turned(upper, start, start, end), weight[:start].t())
    return product(inverse.t().contiguous(), carried.t()).add_(weight[start:end])


def _turned(upper: Tensor, rows: int, start: int, end: int) -> Tensor:
    """The first ``rows`` of some columns of ``R``, as rows; copied before they are turned, which is faster."""
    return upper[:rows, start:end].contiguous().t().contiguous()


def _blocks(order: Order, grids: FixedGrids | FittedGrids, width: int, size: int) -> Iterator[list[_Piece]]:
    """Blocks of at most ``size`` columns; a group that is to be fitted starts with its block, or lies within it."""
    if isinstance(grids, FixedGrids):
        yield from ([_Piece(start, min(start + size, width), 0, None)] for start in range(0, width, size))
        return
    if grids.scheme.axis == 0:
        columns = range(width) if order.columns is None else order.columns.tolist()
        pieces = [
            _Piece(place, place + 1, number, Run(place, place + 1, number)) for place, number in enumerate(columns)
        ]
        yield from (pieces[start : start + size] for start in range(0, width, size))
        return
    block: list[_Piece] = []
    for run in order.runs:
        if block and run.end - block[0].start > size:
            yield block
            block = []
        if run.end - run.start <= size:
            block.append(_Piece(run.start, run.end, run.number, run))
            continue
        for start in range(run.start, run.end, size):
            yield [_Piece(start, min(start + size, run.end), run.number, run if start == run.start else None)]
    if block:
        yield block
