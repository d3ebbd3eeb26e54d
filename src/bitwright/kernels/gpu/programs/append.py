"""New keys and values into their pages: turned by their positions, coded, written, in one pass over them."""

import triton
import triton.language as tl

from bitwright.kernels.gpu.programs.codes import encode_row, row_parameters
from bitwright.kernels.gpu.programs.search import search

__all__ = ["append", "turn"]


@triton.jit
def _turned(x, at, channel, cosine, sine, row, HEAD: tl.constexpr, TURNED: tl.constexpr):
    """Channels of one head, float32, turned by the row's angles: halves, not pairs (Su et al. 2021, equation 34)."""
    inside = channel < HEAD
    numbers = tl.load(x + at + channel, mask=inside, other=0.0).to(tl.float32)
    if TURNED:
        is_first = channel < HEAD // 2
        angle = tl.where(is_first, channel, channel - HEAD // 2)
        partner = tl.where(is_first, channel + HEAD // 2, channel - HEAD // 2)
        other = tl.load(x + at + partner, mask=inside, other=0.0).to(tl.float32)
        across = other * tl.load(sine + row * (HEAD // 2) + angle, mask=inside, other=0.0)
        along = numbers * tl.load(cosine + row * (HEAD // 2) + angle, mask=inside, other=0.0)
        numbers = along + tl.where(is_first, -across, across)
    return numbers


@triton.jit
def _range(numbers, inside):
    """Least and greatest number, and 0, or NaN if one is not finite."""
    low = tl.min(tl.where(inside, numbers, float("inf")), axis=0)
    high = tl.max(tl.where(inside, numbers, float("-inf")), axis=0)
    return low, high, tl.sum(tl.where(inside, numbers - numbers, 0.0), axis=0)


@triton.jit
def _write(x, at, to, scales, head, cosine, sine, row, place, grids, HEAD: tl.constexpr, WIDTH: tl.constexpr,
           KIND: tl.constexpr, BITS: tl.constexpr, STATIC: tl.constexpr, GRIDS: tl.constexpr,
           TURNED: tl.constexpr):  # fmt: skip
    """One head of one token to ``place``, its number among the cache's tokens and heads. Codes that are searched, and
    those of 4 bits, are made of pairs of channels."""
    if BITS == 4 or GRIDS > 0:
        pair = tl.arange(0, WIDTH // 2)
        channel = 2 * pair
    else:
        channel = tl.arange(0, WIDTH)
        pair = channel
    inside = channel < HEAD
    numbers = _turned(x, at, channel, cosine, sine, row, HEAD, TURNED)
    if KIND == "float":
        tl.store(to + place * HEAD + channel, numbers.to(to.dtype.element_ty), mask=inside)
    else:
        low, high, bad = _range(numbers, inside)
        if BITS == 4 or GRIDS > 0:
            odd = _turned(x, at, channel + 1, cosine, sine, row, HEAD, TURNED)
            odd_low, odd_high, odd_bad = _range(odd, inside)
            low, high, bad = tl.minimum(low, odd_low), tl.maximum(high, odd_high), bad + odd_bad
        if STATIC:
            scale, offset = tl.load(scales + 2 * head), tl.load(scales + 2 * head + 1)
        else:
            scale, offset = row_parameters(low, high, bad, KIND, BITS)
        codes = encode_row(numbers, scale, offset, KIND, BITS)
        if BITS == 4 or GRIDS > 0:
            more = encode_row(odd, scale, offset, KIND, BITS)
            if GRIDS > 0:
                codes, more, scale, offset = search(
                    numbers, odd, inside, offset, high, codes, more, scale, grids, HEAD, (1 << BITS) - 1.0, GRIDS
                )
            if BITS == 4:
                codes = codes | (more << 4)
            else:
                tl.store(to + place * HEAD + channel + 1, more.to(tl.uint8), mask=inside)
        if not STATIC:
            if KIND == "unsigned":
                tl.store(scales + 2 * place, scale)
                tl.store(scales + 2 * place + 1, offset)
            else:
                tl.store(scales + place, scale)
        if BITS == 4:
            tl.store(to + place * (HEAD // 2) + pair, codes.to(tl.uint8), mask=inside)
        else:
            tl.store(to + place * HEAD + channel, codes.to(tl.uint8), mask=inside)


@triton.jit
def append(keys, values, cosine, sine, pages, offsets, key_to, key_scales, value_to, value_scales,
           key_grids, value_grids, kv_heads, key_stride, value_stride, page_tokens,
           HEAD: tl.constexpr, WIDTH: tl.constexpr, KEY_KIND: tl.constexpr, KEY_BITS: tl.constexpr,
           VALUE_KIND: tl.constexpr, VALUE_BITS: tl.constexpr, KEY_STATIC: tl.constexpr, VALUE_STATIC: tl.constexpr,
           KEY_GRIDS: tl.constexpr, VALUE_GRIDS: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """One head of one token: ``keys`` and ``values`` ``[tokens, kv_heads, HEAD]`` with rows of the given strides. A row
    without a page (below 0) is not written. ``GRIDS``: how many grids are searched, or none."""
    row, head = tl.program_id(0), tl.program_id(1)
    page = tl.load(pages + row).to(tl.int64)
    if page >= 0:
        place = (page * kv_heads + head) * page_tokens + tl.load(offsets + row)
        at = row.to(tl.int64) * key_stride + head * HEAD
        _write(keys, at, key_to, key_scales, head, cosine, sine, row, place, key_grids, HEAD, WIDTH, KEY_KIND, KEY_BITS,
               KEY_STATIC, KEY_GRIDS, TURNED)  # fmt: skip
        at = row.to(tl.int64) * value_stride + head * HEAD
        _write(values, at, value_to, value_scales, head, cosine, sine, row, place, value_grids, HEAD, WIDTH, VALUE_KIND,
               VALUE_BITS, VALUE_STATIC, VALUE_GRIDS, False)  # fmt: skip


@triton.jit
def turn(x, cosine, sine, y, stride, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    """One head of one row of queries, turned: ``x`` with rows of ``stride``, ``y [rows, heads, HEAD]``."""
    row, head = tl.program_id(0), tl.program_id(1)
    channel = tl.arange(0, WIDTH)
    numbers = _turned(x, row.to(tl.int64) * stride + head * HEAD, channel, cosine, sine, row, HEAD, True)
    at = (row.to(tl.int64) * tl.num_programs(1) + head) * HEAD + channel
    tl.store(y + at, numbers.to(y.dtype.element_ty), mask=channel < HEAD)
