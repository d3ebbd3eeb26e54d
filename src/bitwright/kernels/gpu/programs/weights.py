"""Codes out of words, two runs of columns at a time, and codes as numbers of the activations' dtype, exactly."""

import triton
import triton.language as tl

__all__ = ["as_numbers", "half_of_pair", "load_words", "pair_of_runs", "with_exponents"]


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
def with_exponents(pair, KIND: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Both codes of a pair set into the mantissas of 16-bit powers of two, where ``DTYPE`` has room for them."""
    if KIND == "integer":  # dtypes on the right: before Triton 3.3 one on the left is equal to no constant
        if DTYPE == tl.float16:  # noqa: SIM300
            pair = pair | 0x64006400  # 1024 + code
        elif DTYPE == tl.bfloat16 and BITS < 8:  # noqa: SIM300
            pair = pair | 0x43004300  # 128 + code
    return pair


@triton.jit
def half_of_pair(pair, HIGH: tl.constexpr):
    """The low or high 16 bits, as uint16."""
    return (pair >> 16).to(tl.uint16) if HIGH else pair.to(tl.uint16)


@triton.jit
def as_numbers(half, zero, levels, KIND: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """``code - zero`` (``zero`` float32 ``[BLOCK_N, 1]``, whole), or the levels of codes, or fp8 numbers, as ``DTYPE``.

    ``half`` is that of a pair :func:`with_exponents`: so a code is a number without a conversion, and the difference
    is exact.
    """
    if KIND == "table":
        numbers = tl.load(levels + half.to(tl.int32)).to(DTYPE)
    elif KIND == "fp8":
        bits = ((half & 0x80) << 8) | ((half & 0x7F) << 7)  # e4m3 lies in the top of float16, 2^8 times smaller
        numbers = (bits.to(tl.float16, bitcast=True) * 256.0).to(DTYPE)
    elif DTYPE == tl.float16:  # noqa: SIM300
        numbers = half.to(tl.float16, bitcast=True) - (zero + 1024.0).to(tl.float16)
    elif DTYPE == tl.bfloat16 and BITS < 8:  # noqa: SIM300
        numbers = half.to(tl.bfloat16, bitcast=True) - (zero + 128.0).to(tl.bfloat16)
    else:
        wide = (half.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)  # 2^23 + code
        numbers = (wide - (zero + 8388608.0)).to(DTYPE)
    return numbers
