"""Packed weights as dense rows, for products of so many rows that unpacking once is nearly free."""

import triton
import triton.language as tl

from bitwright.kernels.gpu.programs.linear import codes_of_runs, columns_of_slots, zero_points
from bitwright.kernels.gpu.programs.weights import as_numbers, half_of_pair, with_exponents

__all__ = ["expand"]


@triton.jit(do_not_specialize=["first", "last", "groups"])
def expand(words, scale, zero, remainder, levels, order, dense, first, last, n_out, columns, slots, groups,
           BITS: tl.constexpr, P0: tl.constexpr, P1: tl.constexpr, P2: tl.constexpr, WORDS: tl.constexpr,
           RUN: tl.constexpr, CHUNK: tl.constexpr, GROUP: tl.constexpr, SPAN: tl.constexpr,
           KIND: tl.constexpr, ZERO: tl.constexpr, ORDERED: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """One chunk of ``BLOCK_N`` rows: ``dense [last - first, columns]``, computed in float32 and rounded once."""
    row, chunk = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    n = first + row
    rows_in = n < last
    at = (chunk * n_out + n) * WORDS
    for run in tl.static_range(CHUNK // RUN):
        slot = chunk * CHUNK + run * RUN
        if run * RUN % SPAN == 0:
            group = tl.minimum(slot // GROUP, groups - 1) * n_out + n
            offset = zero_points(zero, group, rows_in, BITS, ZERO)
            factor = tl.load(scale + group, mask=rows_in, other=0.0).to(tl.float32)[:, None]
        if run % 2 == 0:
            codes = codes_of_runs(words, at, rows_in, run, P0, P1, P2, RUN, CHUNK)
            codes = codes << 1 if ZERO == "doubled" else codes
            codes = with_exponents(codes, KIND, BITS, tl.float32)
        numbers = as_numbers(half_of_pair(codes, run % 2 == 1), offset, levels, KIND, BITS, tl.float32)
        if ZERO == "float":
            numbers -= tl.load(remainder + group, mask=rows_in, other=0.0)[:, None]
        column, inside = columns_of_slots(order, slot, slots, ORDERED, RUN)
        to = dense + row.to(tl.int64)[:, None] * columns + column[None, :]
        tl.store(to, (numbers * factor).to(dense.dtype.element_ty), mask=rows_in[:, None] & inside[None, :])
