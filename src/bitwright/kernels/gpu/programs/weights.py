"""Codes out of words, two runs of columns at a time, and codes as numbers of the activations' dtype, exactly."""

import triton
import triton.language as tl

__all__ = ["as_numbers", "high_half", "load_words", "low_half", "pair_of_runs"]


@triton.jit
def load_words(words, rows_at, rows_in, first, RUN: tl.constexpr):
    """One run of words of each row: int32 ``[BLOCK_N, RUN]``; zeros for rows that are not there."""
    at = rows_at[:, None] + (first + tl.arange(0, RUN))[None, :]
    return tl.load(words + at, mask=rows_in[:, None], other=0)


@triton.jit
def pair_of_runs(words, SLOT: tl.constexpr, WIDTH: tl.constexpr):
    """The codes of slots ``SLOT`` and ``SLOT + 1`` (``SLOT`` even) in the low and high halves of int32."""
    HALF: tl.constexpr = (1 << WIDTH) - 1
    return (words >> (WIDTH * (SLOT // 2))) & (HALF * 65537)


@triton.jit
def low_half(pair):
    return pair & 0xFFFF


@triton.jit
def high_half(pair):
    return (pair >> 16) & 0xFFFF


@triton.jit
def as_numbers(codes, zero, levels, KIND: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """``codes - zero`` (``zero`` float32 ``[BLOCK_N, 1]``, whole), or the levels of codes, or fp8 numbers, as ``DTYPE``.

    A code set into the mantissa of a power of two becomes a number without a conversion, and the difference is exact.
    """
    if KIND == "table":
        numbers = tl.load(levels + codes).to(DTYPE)
    elif KIND == "fp8":
        bits = ((codes & 0x80) << 8) | ((codes & 0x7F) << 7)  # e4m3 lies in the top of float16, 2^8 times smaller
        numbers = (bits.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0).to(DTYPE)
    elif DTYPE == tl.float16:
        numbers = (codes | 0x6400).to(tl.uint16).to(tl.float16, bitcast=True) - (zero + 1024.0).to(tl.float16)
    elif DTYPE == tl.bfloat16 and BITS < 8:
        numbers = (codes | 0x4300).to(tl.uint16).to(tl.bfloat16, bitcast=True) - (zero + 128.0).to(tl.bfloat16)
    else:
        numbers = ((codes | 0x4B000000).to(tl.float32, bitcast=True) - (zero + 8388608.0)).to(DTYPE)
    return numbers
