"""Which grid is best for one token's head: codes of few bits, chosen among many grids by least squares.

The numbers ``x`` of a row are measured first: ``u = round((x - min) * (1 / (max - min) * UNITS))``, whole numbers that
float32 sums exactly in any order, so that whoever computes it finds the same codes, whatever else is in the batch. Each
candidate grid codes them, ``c = clamp(round((u - offset) * factor))``; the line through these codes that fits ``u``
best explains ``S_cu^2 / S_cc`` of the squares of ``u``, where ``S_ab = n sum(ab) - sum(a) sum(b)``. Of the first grid
that explains most, codes and line are stored, the line taken back to the scale of ``x``.

The first grid is the plain one, from least to greatest. Those of few bits that follow are narrower or a little wider,
and shifted: what they lose at the ends they gain in between. Those of 8 bits are only wider, and there are many: eight
numbers, say, fall near the lines of one of 256 grids by chance, which quarters their squared error.
Reference: Lloyd (1982), section V, fits levels to given codes so; here levels are evenly spaced.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["grids", "most_numbers", "search_grids"]

UNITS = 4095  # of a range; 15 steps of 4 bits divide it, and 3 steps of 2 bits
SHIFTS = 4
FEW_BITS, EIGHT_BITS = (8, 0.75, 0.05), (64, 1.0, 1 / 128)  # ratios to the plain range: how many, the first, the step
LEAST, GREATEST = 2.0**-100, 2.0**100  # ranges that are searched: their inverses are floats, too
TILE = 1 << 19  # numbers coded at a time


@cache
def grids(code_max: int) -> tuple[tuple[float, float], ...]:
    """Offset and factor of every candidate, to be rounded to float32."""
    step = UNITS / code_max
    ratios, narrowest, further = EIGHT_BITS if code_max == 255 else FEW_BITS
    found = [(0.0, code_max / UNITS)]
    for number in range(ratios):
        ratio = narrowest + further * number
        for place in range(SHIFTS):
            shift = (place + 0.5) / SHIFTS - 0.5
            found.append((UNITS * (1 - ratio) / 2 + shift * (step * ratio), 1 / (step * ratio)))
    return tuple(found)


def most_numbers(code_max: int) -> int:
    """How long a searched row is at most, so that sums of codes times units stay below 2^24; and of 8 bits as long as
    scale and offset take no fewer bytes than the codes."""
    return 8 if code_max == 255 else 256


def search_grids(rows: Tensor, code_max: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, scale and offset of each row of ``rows`` (float32 ``[rows, n]``, finite, ``n <= most_numbers``).

    Returns:
        codes uint8 ``[rows, n]``; scale and low, float32 ``[rows]`` (``number = code * scale + low``); and bool
        ``[rows]``: which rows were searched. Of others, whose range is zero, tiny or huge, nothing is said.
    """
    tables = torch.tensor(grids(code_max), dtype=torch.float64, device=rows.device).to(torch.float32)
    offsets, factors = (column.view(-1, 1, 1) for column in tables.unbind(1))
    tile = max(1, TILE // (len(tables) * max(1, rows.shape[1])))
    parts = [_search(part, offsets, factors, code_max) for part in torch.split(rows, tile)]
    codes, scale, low, found = (torch.cat(column) for column in zip(*parts, strict=True))
    return codes, scale, low, found


def _search(rows: Tensor, offsets: Tensor, factors: Tensor, code_max: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    count = rows.shape[1]
    least = rows.amin(1, keepdim=True)
    width = rows.amax(1, keepdim=True) - least
    searched = (width >= LEAST) & (width <= GREATEST)
    width = torch.where(searched, width, 1.0)
    units = torch.where(searched, ((rows - least) * (width.reciprocal() * UNITS)).round(), 0.0)
    codes = ((units - offsets) * factors).round().clamp(0, code_max)  # [grids, rows, n]
    sum_c, sum_u = codes.sum(2).double(), units.sum(1).double()
    squares = count * codes.square().sum(2).double() - sum_c.square()
    products = count * (codes * units).sum(2).double() - sum_c * sum_u
    share = products.square() / torch.where(squares == 0, 1.0, squares)
    # The first of equal ones: what argmax takes is not said.
    is_best = share == share.amax(0)
    best = torch.where(is_best, torch.arange(len(share), device=rows.device)[:, None], len(share)).amin(0)
    sum_c, squares, products = (each.gather(0, best[None])[0] for each in (sum_c, squares, products))
    squares = torch.where(squares == 0, 1.0, squares)
    step = width[:, 0].double() / UNITS
    scale = ((products / squares) * step).to(torch.float32)
    offset = ((sum_u * squares - products * sum_c) / (count * squares) * step).to(torch.float32)
    chosen = codes.gather(0, best[None, :, None].expand(1, -1, count))[0].to(torch.uint8)
    return chosen, scale, least[:, 0] + offset, searched[:, 0]
