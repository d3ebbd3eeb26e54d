"""Activations times packed weights: ``y[m, n] = sum_k x[m, k] w[n, k]``, computed as ``w x`` so that the unpacked
weights stay in registers, where both generations of matrix units take their first operand.

Codes less their zero points are whole numbers that every dtype of activations holds exactly. They are multiplied as
they are, and the sums of a group (or of as much of it as lies in one chunk) by the scale, in float32.
"""

import triton
import triton.language as tl

from bitwright.kernels.gpu.programs.weights import (
    as_numbers,
    half_of_pair,
    load_words,
    pair_of_runs,
    with_exponents,
)

__all__ = ["add_parts", "codes_of_runs", "columns_of_slots", "linear", "zero_points"]


@triton.jit
def columns_of_slots(order, first, slots, ORDERED: tl.constexpr, RUN: tl.constexpr):
    """The columns of one run of slots, and which of them there are."""
    slot = first + tl.arange(0, RUN)
    if ORDERED:
        column = tl.load(order + slot, mask=slot < slots, other=-1)
        inside = column >= 0
    else:
        column = slot
        inside = slot < slots
    return column, inside


@triton.jit
def _activations(x, order, first, slots, at_rows, in_rows, ORDERED: tl.constexpr, RUN: tl.constexpr):
    """``x`` of one run of slots, transposed: ``[RUN, BLOCK_M]``, with zeros beyond the ends."""
    column, inside = columns_of_slots(order, first, slots, ORDERED, RUN)
    return tl.load(x + at_rows[None, :] + column[:, None], mask=inside[:, None] & in_rows[None, :], other=0.0)


@triton.jit
def _pair(words, at, rows_in, START: tl.constexpr, RUN_INDEX: tl.constexpr, WIDTH: tl.constexpr, RUN: tl.constexpr):
    """The codes of a part for runs ``RUN_INDEX`` and the next."""
    PER: tl.constexpr = 32 // WIDTH
    word = load_words(words, at, rows_in, START + (RUN_INDEX // PER) * RUN, RUN)
    return pair_of_runs(word, RUN_INDEX % PER, WIDTH)


@triton.jit
def codes_of_runs(words, at, rows_in, RUN_INDEX: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr,
                  RUN: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """The codes of two runs, in halves of int32, put together from up to three parts."""
    codes = _pair(words, at, rows_in, 0, RUN_INDEX, P0, RUN)
    if P1 > 0:
        codes |= _pair(words, at, rows_in, CHUNK * P0 // 32, RUN_INDEX, P1, RUN) << P0
    if P2 > 0:
        codes |= _pair(words, at, rows_in, CHUNK * (P0 + P1) // 32, RUN_INDEX, P2, RUN) << (P0 + P1)
    return codes


@triton.jit
def add_parts(total, partials, counters, tile, split, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """The sum of the parts of a tile, one of each program along the second axis, in order, for the last of them to end;
    whether this is it."""
    parts = tl.num_programs(1)
    inner = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    tiles = partials + tile.to(tl.int64) * parts * BLOCK_N * BLOCK_M
    tl.store(tiles + split * BLOCK_N * BLOCK_M + inner, total)
    tl.debug_barrier()
    is_last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == parts - 1
    if is_last:
        total = tl.load(tiles + inner, cache_modifier=".cg")
        for part in range(1, parts):
            total += tl.load(tiles + part * BLOCK_N * BLOCK_M + inner, cache_modifier=".cg")
        tl.store(counters + tile, 0)
    return total, is_last


@triton.jit
def _finish(y, total, partials, counters, bias, n, m, n_out, rows, tile, split,
            IS_SPLIT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):  # fmt: skip
    """Store a tile; where several programs have parts of it, the last to end adds them up, in the parts' order."""
    here = (n < n_out)[:, None] & (m < rows)[None, :]
    is_last = True
    if IS_SPLIT:
        total, is_last = add_parts(total, partials, counters, tile, split, BLOCK_N, BLOCK_M)
    if is_last:
        if HAS_BIAS:
            total += tl.load(bias + n, mask=n < n_out, other=0.0).to(tl.float32)[:, None]
        tl.store(y + m.to(tl.int64)[None, :] * n_out + n[:, None], total.to(y.dtype.element_ty), mask=here)


@triton.jit
def zero_points(zero, group, rows_in, BITS: tl.constexpr, ZERO: tl.constexpr):
    """The whole number that is taken off each row's codes, float32 ``[BLOCK_N, 1]``."""
    if ZERO == "doubled":  # one-bit codes are worth -1 and 1: 0 and 2 around 1
        offset = tl.full(group.shape, 1.0, dtype=tl.float32)
    elif ZERO == "none":
        offset = tl.full(group.shape, 1 << (BITS - 1), dtype=tl.float32)
    else:
        offset = tl.load(zero + group, mask=rows_in, other=0).to(tl.float32)
    return offset[:, None]


@triton.jit(do_not_specialize=["rows", "chunks", "groups", "chunks_each"])
def linear(x, words, scale, zero, remainder, levels, order, bias, y, partials, counters,
           rows, n_out, columns, slots, chunks, groups, chunks_each,
           BITS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, WORDS: tl.constexpr,
           RUN: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
           KIND: tl.constexpr, ZERO: tl.constexpr, ORDERED: tl.constexpr, HAS_BIAS: tl.constexpr,
           BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, IS_SPLIT: tl.constexpr):  # fmt: skip
    """One tile ``[BLOCK_N, BLOCK_M]`` of ``y`` transposed, over ``chunks_each`` chunks of columns.

    ``GROUP`` columns share a scale; ``SPAN`` divides it and ``CHUNK``.
    """
    tile, split = tl.program_id(0), tl.program_id(1)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    n = (tile // tiles_m) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = (tile % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_in, in_rows, at_rows = n < n_out, m < rows, m.to(tl.int64) * columns
    total = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    first = split * chunks_each
    for chunk in range(first, min(first + chunks_each, chunks)):
        at = (chunk * n_out + n) * WORDS
        for run in tl.static_range(CHUNK // RUN):
            slot = chunk * CHUNK + run * RUN
            if run * RUN % SPAN == 0:
                group = tl.minimum(slot // GROUP, groups - 1) * n_out + n
                offset = zero_points(zero, group, rows_in, BITS, ZERO)
                part = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
                sums = tl.zeros((BLOCK_M,), dtype=tl.float32)
            if run % 2 == 0:
                codes = codes_of_runs(words, at, rows_in, run, P0, P1, P2, RUN, CHUNK)
                codes = codes << 1 if ZERO == "doubled" else codes
                codes = with_exponents(codes, KIND, BITS, x.dtype.element_ty)
            numbers = as_numbers(half_of_pair(codes, run % 2 == 1), offset, levels, KIND, BITS, x.dtype.element_ty)
            here = _activations(x, order, slot, slots, at_rows, in_rows, ORDERED, RUN)
            part = tl.dot(numbers, here, part, input_precision="ieee")
            if ZERO == "float":
                sums += tl.sum(here.to(tl.float32), axis=0)
            if (run + 1) * RUN % SPAN == 0:
                if ZERO == "float":
                    part -= tl.load(remainder + group, mask=rows_in, other=0.0)[:, None] * sums[None, :]
                total += part * tl.load(scale + group, mask=rows_in, other=0.0).to(tl.float32)[:, None]
    _finish(y, total, partials, counters, bias, n, m, n_out, rows, tile, split, IS_SPLIT, HAS_BIAS, BLOCK_N, BLOCK_M)
