"""Keys and values as they are stored, out of numbers and back into them.

Codes come back less the middle of their range, which every dtype of queries holds exactly; what the middle is worth is
part of the offset. Two 4-bit codes lie in a byte, the even channel low.
"""

import triton
import triton.language as tl

__all__ = ["centred_codes", "encode_row", "parameters_of_tokens", "round_even", "row_parameters"]

TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)  # the smallest normal float32


@triton.jit
def round_even(numbers):
    """To the nearest whole number, half to even, of magnitudes below 2^22."""
    return (numbers + 12582912.0) - 12582912.0


@triton.jit
def _as_fp8(numbers):
    """The bits of e4m3 nearest to float32 ``numbers`` (at most 448), half to even, in int32."""
    bits = numbers.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    normal = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    small = round_even(tl.abs(numbers) * 512.0).to(tl.int32)  # below 2^-6 codes are multiples of 2^-9
    return tl.where(size < 0x3C800000, small, normal) | ((bits >> 24) & 0x80)


@triton.jit
def row_parameters(low, high, bad, KIND: tl.constexpr, BITS: tl.constexpr):
    """Scale and offset of a row whose least and greatest numbers are given, as ``core.kv_codes`` has them; NaN where
    ``bad`` is."""
    largest = tl.maximum(tl.abs(low), tl.abs(high))
    if KIND == "unsigned":
        offset = low
        scale = tl.div_rn(high - low, (1 << BITS) - 1.0)
        scale = tl.where(high == low, 0.0, tl.maximum(scale, TINY))
    else:
        offset = low * 0.0
        scale = tl.maximum(tl.div_rn(largest, 448.0 if KIND == "fp8" else (1 << (BITS - 1)) - 1.0), TINY)
        scale = tl.where((low == high) & (largest >= TINY), largest, scale)
        scale = tl.where(largest == 0.0, 0.0, scale)
    return scale + bad, offset + bad


@triton.jit
def encode_row(numbers, scale, offset, KIND: tl.constexpr, BITS: tl.constexpr):
    """The bits of each number's code, int32, less than ``2**BITS``."""
    scaled = tl.div_rn(numbers - offset, tl.where(scale == 0.0, 1.0, scale) + tl.zeros_like(numbers))
    if KIND == "fp8":
        codes = _as_fp8(tl.minimum(tl.maximum(scaled, -448.0), 448.0))
    elif KIND == "unsigned":
        codes = round_even(tl.minimum(tl.maximum(scaled, 0.0), (1 << BITS) - 1.0)).to(tl.int32)
    else:
        LEAST: tl.constexpr = -(1 << (BITS - 1))
        codes = round_even(tl.minimum(tl.maximum(scaled, LEAST * 1.0), -LEAST - 1.0)).to(tl.int32)
        codes = codes & 0xFF if BITS == 8 else codes - LEAST
    return codes


@triton.jit
def centred_codes(codes, KIND: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Codes (bits of less than ``2**BITS``, any integer dtype) as ``DTYPE``: unsigned ones less ``2**(BITS-1)``."""
    if KIND == "fp8":
        wide = codes.to(tl.uint16)
        bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)  # e4m3 lies in the top of float16, 2^8 times smaller
        numbers = (bits.to(tl.float16, bitcast=True) * 256.0).to(DTYPE)
    else:
        if KIND == "signed" and BITS == 8:
            codes = codes ^ 0x80
        # Set into the mantissa of a power of two. Not by way of float16 to bfloat16, which is a conversion each.
        if DTYPE == tl.bfloat16 and BITS < 8:  # noqa: SIM300
            wide = (codes.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True)
            numbers = wide - tl.full(codes.shape, 128.0 + (1 << (BITS - 1)), dtype=tl.bfloat16)
        elif DTYPE == tl.bfloat16:  # noqa: SIM300
            wide = (codes.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True)
            numbers = (wide - (8388608.0 + (1 << (BITS - 1)))).to(tl.bfloat16)
        else:
            wide = (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True)
            numbers = (wide - (1024.0 + (1 << (BITS - 1)))).to(DTYPE)
    return numbers


@triton.jit
def parameters_of_tokens(scales, rows, head, inside, KIND: tl.constexpr, BITS: tl.constexpr, STATIC: tl.constexpr):
    """Scale and offset (of a centred code 0) of each token, float32 ``[tokens]``.

    ``rows``: a token's number in the whole cache; ``STATIC``: instead one scale and offset for a head.
    """
    if STATIC:
        scale = tl.load(scales + 2 * head) + tl.zeros(rows.shape, dtype=tl.float32)
        offset = tl.load(scales + 2 * head + 1) + tl.zeros(rows.shape, dtype=tl.float32)
    elif KIND == "unsigned":
        scale = tl.load(scales + 2 * rows, mask=inside, other=0.0)
        offset = tl.load(scales + 2 * rows + 1, mask=inside, other=0.0)
    else:
        scale = tl.load(scales + rows, mask=inside, other=0.0)
        offset = tl.zeros(rows.shape, dtype=tl.float32)
    if KIND == "unsigned":
        offset += scale * (1 << (BITS - 1))
    return scale, offset
