"""Products on the fp8 matrix units (Ada, Hopper): e4m3 tokens times e4m3 weights, or packed 4-bit codes made e4m3.

Tokens have one scale each. A weight of the fp8-aware kind is ``s8 * fp8(s4 * (code - zero))``, exactly; any other has a
scale for each row, or each group of columns.
"""

import triton
import triton.language as tl

from bitwright.kernels.gpu.programs.codes import encode_row
from bitwright.kernels.gpu.programs.linear import add_parts
from bitwright.kernels.gpu.programs.weights import half_of_pair, load_words, pair_of_runs

__all__ = ["fp8_product", "fp8_tokens"]


@triton.jit
def fp8_tokens(x, codes, scales, columns, slots, WIDTH: tl.constexpr):
    """One row of ``x`` as e4m3 bits (uint8 ``[rows, slots]``) and its scale, largest magnitude / 448."""
    row, slot = tl.program_id(0), tl.arange(0, WIDTH)
    values = tl.load(x + row.to(tl.int64) * columns + slot, mask=slot < columns, other=0.0).to(tl.float32)
    bad = tl.sum(values - values, axis=0)
    scale = tl.maximum(tl.div_rn(tl.max(tl.abs(values), axis=0), 448.0), 1.1754943508222875e-38) + bad
    found = encode_row(values, scale, scale * 0.0, "fp8", 8)
    tl.store(codes + row.to(tl.int64) * slots + slot, found.to(tl.uint8), mask=slot < slots)
    tl.store(scales + row, scale)


@triton.jit
def _tokens(codes, first, at_rows, in_rows, STEP: tl.constexpr):
    """Codes of ``STEP`` slots, transposed: e4m3 ``[STEP, BLOCK_M]``."""
    at = codes + at_rows[None, :] + (first + tl.arange(0, STEP))[:, None]
    return tl.load(at, mask=in_rows[None, :], other=0).to(tl.float8e4nv, bitcast=True)


@triton.jit(do_not_specialize=["rows", "groups", "chunks", "chunks_each"])
def fp8_product(codes, token_scales, weight, scale, zero, bias, y, partials, counters,
                rows, n_out, slots, groups, chunks, chunks_each,
                BITS: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, HAS_ZERO: tl.constexpr,
                HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
                IS_SPLIT: tl.constexpr):  # fmt: skip
    """One tile ``[BLOCK_N, BLOCK_M]`` of ``y`` transposed. ``BITS`` 8: e4m3 weights ``[n_out, slots]``, a scale a row.
    4: words of codes whose differences from their zero points, at most 15, are e4m3 numbers as they are.
    Where several programs have parts of it, the last to end adds them up, in the parts' order."""
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    n = (tile // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_in, in_rows, at_rows = n < n_out, m < rows, m.to(tl.int64) * slots
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    first = split * chunks_each
    for chunk in range(first, min(first + chunks_each, chunks)):
        if BITS == 8:
            at = weight + n.to(tl.int64)[:, None] * slots + (chunk * CHUNK + tl.arange(0, CHUNK))[None, :]
            numbers = tl.load(at, mask=rows_in[:, None], other=0).to(tl.float8e4nv, bitcast=True)
            total = tl.dot(numbers, _tokens(codes, chunk * CHUNK, at_rows, in_rows, CHUNK), total)
        else:
            words = load_words(weight, (chunk * n_out + n) * 32, rows_in, 0, 32)
            for run in tl.static_range(8):
                group = tl.minimum((chunk * CHUNK + run * 32) // GROUP, groups - 1) * n_out + n
                centre = tl.load(zero + group, mask=rows_in, other=0).to(tl.int32)[:, None] if HAS_ZERO else 8
                half = half_of_pair(pair_of_runs(words, run, 4), run % 2 == 1).to(tl.int32) - centre
                here = _tokens(codes, chunk * CHUNK + run * 32, at_rows, in_rows, 32)
                part = tl.dot(half.to(tl.float16).to(tl.float8e4nv), here)
                total += part * tl.load(scale + group, mask=rows_in, other=0.0).to(tl.float32)[:, None]
    is_last = True
    if IS_SPLIT:
        total, is_last = add_parts(total, partials, counters, tile, split, BLOCK_N, BLOCK_M)
    if BITS == 8:
        total *= tl.load(scale + n, mask=rows_in, other=0.0).to(tl.float32)[:, None]
    total *= tl.load(token_scales + m, mask=in_rows, other=0.0)[None, :]
    if HAS_BIAS:
        total += tl.load(bias + n, mask=rows_in, other=0.0).to(tl.float32)[:, None]
    if is_last:
        here = rows_in[:, None] & in_rows[None, :]
        tl.store(y + m.to(tl.int64)[None, :] * n_out + n[:, None], total.to(y.dtype.element_ty), mask=here)
