"""The best of many grids for a row of keys or values: the steps, and so the codes, of ``core.kv_search``.

What is summed are whole numbers that float32 holds exactly, and what is compared is float64: any order gives the same.
"""

import triton
import triton.language as tl

from bitwright.kernels.gpu.programs.codes import round_even

__all__ = ["search"]


@triton.jit
def _fit(units, other, inside, sum_u, grids, number, HEAD: tl.constexpr, MOST: tl.constexpr):
    """Codes on one grid, and the sums of the line through them: ``sum c``, ``n S_cc`` and ``n S_cu``, float64."""
    offset, factor = tl.load(grids + 2 * number), tl.load(grids + 2 * number + 1)
    codes = tl.minimum(tl.maximum(round_even((units - offset) * factor), 0.0), MOST)
    more = tl.minimum(tl.maximum(round_even((other - offset) * factor), 0.0), MOST)
    codes, more = tl.where(inside, codes, 0.0), tl.where(inside, more, 0.0)
    sum_c = tl.sum(codes + more, axis=0).to(tl.float64)
    squares = HEAD * tl.sum(codes * codes + more * more, axis=0).to(tl.float64) - sum_c * sum_c
    products = HEAD * tl.sum(codes * units + more * other, axis=0).to(tl.float64) - sum_c * sum_u
    return codes, more, sum_c, tl.where(squares == 0.0, 1.0, squares), products


@triton.jit
def search(even, odd, inside, low, high, plain_even, plain_odd, plain_scale, grids,
           HEAD: tl.constexpr, MOST: tl.constexpr, GRIDS: tl.constexpr):  # fmt: skip
    """Codes of even and odd channels (int32), scale and offset of one row: those given where its range is zero, tiny,
    huge or not a number; else of the first of the ``GRIDS`` grids (offset and factor each) that explains most."""
    width = high - low
    is_searched = (width >= 7.888609052210118e-31) & (width <= 1.2676506002282294e30)  # 2^-100 and 2^100
    width = tl.where(is_searched, width, 1.0)
    by = tl.where(is_searched, tl.div_rn(width * 0.0 + 1.0, width) * 4095.0, 0.0)
    units = round_even(tl.where(inside, (even - low) * by, 0.0))
    other = round_even(tl.where(inside, (odd - low) * by, 0.0))
    sum_u = tl.sum(units + other, axis=0).to(tl.float64)
    best, most = tl.program_id(0) * 0, sum_u * 0.0 - 1.0
    for number in range(GRIDS):
        _, _, _, squares, products = _fit(units, other, inside, sum_u, grids, number, HEAD, MOST)
        share = products * products / squares
        best = tl.where(share > most, number, best)
        most = tl.maximum(share, most)
    codes, more, sum_c, squares, products = _fit(units, other, inside, sum_u, grids, best, HEAD, MOST)
    step = width.to(tl.float64) / 4095.0
    scale = (products / squares * step).to(tl.float32)
    offset = low + ((sum_u * squares - products * sum_c) / (HEAD * squares) * step).to(tl.float32)
    even_codes = tl.where(is_searched, codes.to(tl.int32), plain_even)
    odd_codes = tl.where(is_searched, more.to(tl.int32), plain_odd)
    return even_codes, odd_codes, tl.where(is_searched, scale, plain_scale), tl.where(is_searched, offset, low)
