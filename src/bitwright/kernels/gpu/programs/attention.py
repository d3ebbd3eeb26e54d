"""Attention over a paged cache of numbers or codes, tile by tile with a running maximum (Dao et al. 2022; the split of
a context among programs: Dao et al. 2023, "Flash-Decoding"). All query heads that read one head of keys are rows of one
product, so every key is loaded once for them."""

import triton
import triton.language as tl

from bitwright.kernels.gpu.programs.codes import centred_codes, parameters_of_tokens

__all__ = ["attend", "combine"]

LOWEST: tl.constexpr = tl.constexpr(-1e30)  # instead of minus infinity, whose differences are not numbers


@triton.jit
def _numbers(data, rows, inside, HALF: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr,
             BITS: tl.constexpr, DTYPE: tl.constexpr):  # fmt: skip
    """A tile of keys or values, ``[tokens, WIDTH]`` of ``DTYPE``: all channels, or of 4-bit codes the even or odd."""
    PER: tl.constexpr = 8 // BITS if BITS <= 8 else 1
    channel = tl.arange(0, WIDTH // PER)
    at = data + rows[:, None] * (HEAD // PER) + channel[None, :]
    found = tl.load(at, mask=inside[:, None] & (channel < HEAD // PER)[None, :], other=0)
    if KIND == "float":
        found = found.to(DTYPE)
    elif BITS == 4:
        found = centred_codes((found >> 4) if HALF == 1 else (found & 15), KIND, BITS, DTYPE)
    else:
        found = centred_codes(found, KIND, BITS, DTYPE)
    return found


@triton.jit
def _queries(q, at, rows_in, FIRST: tl.constexpr, STEP: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr):
    """Channels ``FIRST``, ``FIRST + STEP``... of the queries: ``[BLOCK_Q, WIDTH / STEP]``."""
    channel = FIRST + STEP * tl.arange(0, WIDTH // STEP)
    return tl.load(q + at[:, None] + channel[None, :], mask=rows_in[:, None] & (channel < HEAD)[None, :], other=0.0)


@triton.jit
def _scores(even, odd, q_sum, keys, scales, rows, inside, head, HEAD: tl.constexpr, WIDTH: tl.constexpr,
            KIND: tl.constexpr, BITS: tl.constexpr, STATIC: tl.constexpr):  # fmt: skip
    """Products of queries and a tile of keys, float32 ``[BLOCK_Q, tokens]``."""
    DTYPE: tl.constexpr = even.dtype
    tile = _numbers(keys, rows, inside, 0, HEAD, WIDTH, KIND, BITS, DTYPE)
    scores = tl.dot(even, tl.trans(tile), input_precision="ieee")
    if BITS == 4:
        tile = _numbers(keys, rows, inside, 1, HEAD, WIDTH, KIND, BITS, DTYPE)
        scores = tl.dot(odd, tl.trans(tile), scores, input_precision="ieee")
    if KIND != "float":
        scale, offset = parameters_of_tokens(scales, rows, head, inside, KIND, BITS, STATIC)
        scores = scores * scale[None, :] + q_sum[:, None] * offset[None, :]
    return scores


@triton.jit
def _add_values(weights, decay, mixed, other, offsets, values, scales, rows, inside, head, DTYPE: tl.constexpr,
                HEAD: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr,
                STATIC: tl.constexpr):  # fmt: skip
    """What was mixed so far, decayed, and a tile of values by its weights: even (or all) and odd channels, offsets.

    A step of codes is a small part of their range; times a weight it would often be too small for float16. So all is
    mixed larger by a power of two, with which no range of float16 gives numbers too large: see :func:`_in_units`.
    """
    if KIND != "float":
        scale, offset = parameters_of_tokens(scales, rows, head, inside, KIND, BITS, STATIC)
        offsets = offsets * decay + tl.sum(weights * offset[None, :], axis=1)
        weights = weights * (scale * (256.0 if KIND == "fp8" else (1 << (BITS - 2)) * 1.0))[None, :]
    weights = weights.to(DTYPE)
    numbers = _numbers(values, rows, inside, 0, HEAD, WIDTH, KIND, BITS, DTYPE)
    mixed = tl.dot(weights, numbers, mixed * decay[:, None], input_precision="ieee")
    if BITS == 4:
        numbers = _numbers(values, rows, inside, 1, HEAD, WIDTH, KIND, BITS, DTYPE)
        other = tl.dot(weights, numbers, other * decay[:, None], input_precision="ieee")
    return mixed, other, offsets


@triton.jit
def _in_units(mixed, KIND: tl.constexpr, BITS: tl.constexpr):
    """What :func:`_add_values` has mixed, in the size of the values."""
    if KIND == "fp8":
        mixed = mixed * (1.0 / 256.0)
    elif KIND != "float":
        mixed = mixed * (1.0 / (1 << (BITS - 2)))
    return mixed


@triton.jit
def _token_rows(pages, first, length, head, kv_heads, PAGE: tl.constexpr, BLOCK_T: tl.constexpr):
    """Positions of a tile of tokens, which of them there are, and where they lie in the cache (int64)."""
    token = first + tl.arange(0, BLOCK_T)
    inside = token < length
    page = tl.load(pages + token // PAGE, mask=inside, other=0).to(tl.int64)
    return token, inside, (page * kv_heads + head) * PAGE + token % PAGE


@triton.jit
def _store_rows(out, at, even, odd, rows_in, HEAD: tl.constexpr, WIDTH: tl.constexpr, BITS: tl.constexpr):
    STEP: tl.constexpr = 2 if BITS == 4 else 1
    channel = STEP * tl.arange(0, WIDTH // STEP)
    mask = rows_in[:, None] & (channel < HEAD)[None, :]
    tl.store(out + at[:, None] + channel[None, :], even.to(out.dtype.element_ty), mask=mask)
    if BITS == 4:
        tl.store(out + at[:, None] + channel[None, :] + 1, odd.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["most_pages", "window"])
def attend(q, keys, key_scales, values, value_scales, pages, blocks, starts, lengths, out, statistics,
           factor, kv_heads, most_pages, window, split_tokens, PAGE: tl.constexpr,
           GROUP: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr,
           KEY_KIND: tl.constexpr, KEY_BITS: tl.constexpr, KEY_STATIC: tl.constexpr,
           VALUE_KIND: tl.constexpr, VALUE_BITS: tl.constexpr, VALUE_STATIC: tl.constexpr,
           BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, PARTIAL: tl.constexpr):  # fmt: skip
    """``BLOCK_Q`` rows of (token, query head of the group) of one sequence, over ``split_tokens`` of its context."""
    block, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(blocks + 2 * block)
    start, length = tl.load(starts + sequence), tl.load(lengths + sequence)
    new = tl.load(starts + sequence + 1) - start
    row = tl.load(blocks + 2 * block + 1) + tl.arange(0, BLOCK_Q)
    rows_in, position = row < new * GROUP, length - new + row // GROUP
    at = (start + row // GROUP).to(tl.int64) * (kv_heads * GROUP) + head * GROUP + row % GROUP
    even = _queries(q, at * HEAD, rows_in, 0, 2 if KEY_BITS == 4 else 1, HEAD, WIDTH)
    odd = _queries(q, at * HEAD, rows_in, 1, 2, HEAD, WIDTH) if KEY_BITS == 4 else even
    q_sum = tl.sum(even.to(tl.float32), axis=1) + (tl.sum(odd.to(tl.float32), axis=1) if KEY_BITS == 4 else 0.0)
    largest = tl.full((BLOCK_Q,), LOWEST, dtype=tl.float32)
    total = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    offsets = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    mixed = tl.zeros((BLOCK_Q, WIDTH // 2 if VALUE_BITS == 4 else WIDTH), dtype=tl.float32)
    other = tl.zeros((BLOCK_Q, WIDTH // 2 if VALUE_BITS == 4 else 16), dtype=tl.float32)
    seen = tl.minimum(length, tl.max(tl.where(rows_in, position, -1), axis=0) + 1)  # no row sees what comes after
    least = tl.min(tl.where(rows_in, position, length), axis=0) - window + 1
    first = tl.maximum(split * split_tokens, tl.maximum(least, 0) // BLOCK_T * BLOCK_T)
    for tile in range(first, tl.minimum(seen, (split + 1) * split_tokens), BLOCK_T):
        token, inside, rows = _token_rows(pages + sequence * most_pages, tile, length, head, kv_heads, PAGE, BLOCK_T)
        scores = _scores(even, odd, q_sum, keys, key_scales, rows, inside, head, HEAD, WIDTH, KEY_KIND, KEY_BITS,
                         KEY_STATIC)  # fmt: skip
        visible = (token[None, :] <= position[:, None]) & (token[None, :] > position[:, None] - window)
        scores = tl.where(visible & inside[None, :], scores * factor, LOWEST)
        higher = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.where(scores > LOWEST, tl.exp2(scores - higher[:, None]), 0.0)
        decay = tl.exp2(largest - higher)
        total, largest = total * decay + tl.sum(weights, axis=1), higher
        mixed, other, offsets = _add_values(
            weights, decay, mixed, other, offsets, values, value_scales, rows, inside, head, even.dtype, HEAD, WIDTH,
            VALUE_KIND, VALUE_BITS, VALUE_STATIC,
        )  # fmt: skip
    mixed = _in_units(mixed, VALUE_KIND, VALUE_BITS) + offsets[:, None]
    other = _in_units(other, VALUE_KIND, VALUE_BITS) + offsets[:, None]
    if PARTIAL:
        at = ((block.to(tl.int64) * kv_heads + head) * tl.num_programs(2) + split) * BLOCK_Q + tl.arange(0, BLOCK_Q)
        tl.store(statistics + 2 * at, largest)
        tl.store(statistics + 2 * at + 1, total)
        _store_rows(out, at * HEAD, mixed, other, rows_in, HEAD, WIDTH, VALUE_BITS)
    else:
        total = tl.where(total > 0.0, total, 1.0)[:, None]  # divided as in `combine`: to the same bit
        _store_rows(out, at * HEAD, mixed / total, other / total, rows_in, HEAD, WIDTH, VALUE_BITS)


@triton.jit(do_not_specialize=["splits"])
def combine(parts, statistics, blocks, starts, lengths, out, kv_heads, splits, split_tokens,
            GROUP: tl.constexpr, HEAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK_Q: tl.constexpr,
            TOGETHER: tl.constexpr):  # fmt: skip
    """One row's parts of a context put together, ``TOGETHER`` at a time, in their order."""
    block, head, own_row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    sequence = tl.load(blocks + 2 * block)
    start, length = tl.load(starts + sequence), tl.load(lengths + sequence)
    row = tl.load(blocks + 2 * block + 1) + own_row
    if row < (tl.load(starts + sequence + 1) - start) * GROUP:
        channel = tl.arange(0, WIDTH)
        largest, total = tl.full((1,), LOWEST, dtype=tl.float32), tl.zeros((1,), dtype=tl.float32)
        mixed = tl.zeros((WIDTH,), dtype=tl.float32)
        there = tl.minimum(splits, tl.cdiv(length, split_tokens))
        for first in range(0, there, TOGETHER):
            split = first + tl.arange(0, TOGETHER)
            at = ((block.to(tl.int64) * kv_heads + head) * splits + split) * BLOCK_Q + own_row
            own = tl.load(statistics + 2 * at, mask=split < there, other=LOWEST)
            weight = tl.load(statistics + 2 * at + 1, mask=split < there, other=0.0)
            mask = (split < there)[:, None] & (channel < HEAD)[None, :]
            part = tl.load(parts + at[:, None] * HEAD + channel[None, :], mask=mask, other=0.0)
            higher = tl.maximum(largest, tl.max(own, axis=0))
            decay, share = tl.exp2(largest - higher), tl.exp2(own - higher)
            total = total * decay + tl.sum(weight * share, axis=0)
            mixed, largest = mixed * decay + tl.sum(part * share[:, None], axis=0), higher
        mixed = mixed / tl.where(total > 0.0, total, 1.0)
        at = (start + row // GROUP).to(tl.int64) * (kv_heads * GROUP) + head * GROUP + row % GROUP
        tl.store(out + at * HEAD + channel, mixed.to(out.dtype.element_ty), mask=channel < HEAD)
