"""8-bit tokens times 8-bit or packed 4-bit weights on the int8 matrix units, summed exactly, scaled once a group.

The steps and their order are those of ``kernels.integer``, none of them fused: the results are equal bit for bit as
long as one program has all groups of a tile.
"""

import triton
import triton.language as tl

from bitwright.kernels.gpu.programs.linear import add_parts
from bitwright.kernels.gpu.programs.weights import half_of_pair, load_words, pair_of_runs

__all__ = ["integer", "scale_products"]


@triton.jit
def _scaled(products, scale, zero, remainder, sums, group, n, m, n_out, rows, groups, ZERO: tl.constexpr):
    """Exact products of a group as float32, less the zero points, times the group's scale; 0 for a group of padding."""
    at = group * n_out + n
    rows_in, in_rows = n < tl.where(group < groups, n_out, 0), m < tl.where(group < groups, rows, 0)
    if ZERO != "none":
        token_sums = tl.load(sums + m * groups + group, mask=in_rows, other=0)[None, :]
        if ZERO == "constant":
            products -= token_sums * 8
        else:
            products -= token_sums * tl.load(zero + at, mask=rows_in, other=0)[:, None]
        numbers = products.to(tl.float32)
        if ZERO == "float":
            numbers -= token_sums.to(tl.float32) * tl.load(remainder + at, mask=rows_in, other=0.0)[:, None]
    else:
        numbers = products.to(tl.float32)
    return numbers * tl.load(scale + at, mask=rows_in, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _tokens(codes, first, at_rows, in_rows, STEP: tl.constexpr):
    """Codes of ``STEP`` slots, transposed: int8 ``[STEP, BLOCK_M]``."""
    return tl.load(codes + at_rows[None, :] + (first + tl.arange(0, STEP))[:, None], mask=in_rows[None, :], other=0)


@triton.jit
def _store(y, total, token_scales, bias, n, m, n_out, rows, stride, HAS_BIAS: tl.constexpr):
    total = total * tl.load(token_scales + m, mask=m < rows, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=n < n_out, other=0.0).to(tl.float32)[:, None]
    here = (n < n_out)[:, None] & (m < rows)[None, :]
    tl.store(y + m.to(tl.int64)[None, :] * stride + n[:, None], total.to(y.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["rows", "groups", "chunks", "chunks_each"])
def integer(codes, token_scales, sums, weight, scale, zero, remainder, bias, y, partials, counters,
            rows, n_out, slots, groups, chunks, chunks_each, chunks_of_group,
            BITS: tl.constexpr, CHUNK: tl.constexpr, SPAN: tl.constexpr, ZERO: tl.constexpr, SINGLE: tl.constexpr,
            HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, IS_SPLIT: tl.constexpr):  # fmt: skip
    """One tile ``[BLOCK_N, BLOCK_M]`` of ``y`` transposed. ``SINGLE``: one group has all columns, so parts are whole
    numbers. ``SPAN`` below ``CHUNK``: several groups lie in a chunk; else a group is ``chunks_of_group`` chunks, all of
    them this program's."""
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    n = (tile // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_in, in_rows, at_rows = n < n_out, m < rows, m.to(tl.int64) * slots
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    products = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    first = split * chunks_each
    last = min(first + chunks_each, chunks)
    for chunk in range(first, last):
        if BITS == 8:
            at = weight + n.to(tl.int64)[:, None] * slots + (chunk * CHUNK + tl.arange(0, CHUNK))[None, :]
            here = _tokens(codes, chunk * CHUNK, at_rows, in_rows, CHUNK)
            # Triton 3.6, among others, takes sums for float32 unless it is told.
            products = tl.dot(tl.load(at, mask=rows_in[:, None], other=0), here, products, out_dtype=tl.int32)
        else:
            words = load_words(weight, (chunk * n_out + n) * 32, rows_in, 0, 32)
            for run in tl.static_range(8):
                half = half_of_pair(pair_of_runs(words, run, 4), run % 2 == 1).to(tl.int8)
                here = _tokens(codes, chunk * CHUNK + run * 32, at_rows, in_rows, 32)
                products = tl.dot(half, here, products, out_dtype=tl.int32)
                if SPAN < CHUNK and (run + 1) * 32 % SPAN == 0:
                    group = (chunk * CHUNK + run * 32) // SPAN
                    total += _scaled(products, scale, zero, remainder, sums, group, n, m, n_out, rows, groups, ZERO)
                    products = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
        if (not SINGLE and SPAN >= CHUNK) and ((chunk + 1) % chunks_of_group == 0 or chunk + 1 == last):
            group = chunk // chunks_of_group
            total += _scaled(products, scale, zero, remainder, sums, group, n, m, n_out, rows, groups, ZERO)
            products = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    is_last = True
    if IS_SPLIT and SINGLE:
        products, is_last = add_parts(products, partials, counters, tile, split, BLOCK_N, BLOCK_M)
    elif IS_SPLIT:
        total, is_last = add_parts(total, partials, counters, tile, split, BLOCK_N, BLOCK_M)
    if SINGLE:
        total = _scaled(products, scale, zero, remainder, sums, tile * 0, n, m, n_out, rows, groups, ZERO)
    if is_last:
        _store(y, total, token_scales, bias, n, m, n_out, rows, n_out, HAS_BIAS)


@triton.jit(do_not_specialize=["rows"])
def scale_products(products, token_scales, sums, scale, zero, remainder, bias, y, rows, n_out, stride,
                   ZERO: tl.constexpr, HAS_BIAS: tl.constexpr,
                   BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Products (int32 ``[rows, n_out]``) of one group to numbers, in ``y`` with rows of ``stride``."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    here = (n < n_out)[:, None] & (m < rows)[None, :]
    found = tl.load(products + m.to(tl.int64)[None, :] * n_out + n[:, None], mask=here, other=0)
    total = _scaled(found, scale, zero, remainder, sums, tl.program_id(0) * 0, n, m, n_out, rows, 1, ZERO)
    _store(y, total, token_scales, bias, n, m, n_out, rows, stride, HAS_BIAS)
