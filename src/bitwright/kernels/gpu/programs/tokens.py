"""Rows of activations, normalized and quantized in one pass: a row is read once and kept in registers."""

import triton
import triton.language as tl

__all__ = ["normalize", "quantize"]


@triton.jit
def _round(numbers):
    """To the nearest whole number, half to even, of magnitudes below 2^22."""
    return (numbers + 12582912.0) - 12582912.0


@triton.jit
def _token_scale(values, inside):
    """The scale of one symmetric int8 token as ``core.grid`` has it; NaN where a number is not finite."""
    low = tl.min(tl.where(inside, values, float("inf")), axis=0)
    high = tl.max(tl.where(inside, values, float("-inf")), axis=0)
    largest = tl.maximum(tl.abs(low), tl.abs(high))
    scale = tl.maximum(tl.div_rn(largest, 127.0), 1.1754943508222875e-38)
    scale = tl.where((low == high) & (largest >= 1.1754943508222875e-38), largest, scale)
    scale = tl.where(largest == 0.0, 0.0, scale)
    return scale + tl.sum(tl.where(inside, values - values, 0.0), axis=0)


@triton.jit
def _store_codes(values, inside, codes, scales, sums, row, slots, groups, WIDTH: tl.constexpr, GROUP: tl.constexpr):
    """Codes of one row, its scale and, for ``GROUP`` above 0, the sums of its codes by group."""
    scale = _token_scale(values, inside)
    scaled = tl.div_rn(values, tl.where(scale == 0.0, 1.0, scale) + tl.zeros_like(values))
    rounded = tl.minimum(tl.maximum(_round(scaled), -128.0), 127.0)
    found = tl.where(inside, rounded, 0.0).to(tl.int8)
    slot = tl.arange(0, WIDTH)
    tl.store(codes + row.to(tl.int64) * slots + slot, found, mask=slot < slots)
    tl.store(scales + row, scale)
    if GROUP > 0:
        by_group = tl.sum(tl.reshape(found.to(tl.int32), (WIDTH // GROUP, GROUP)), axis=1)
        group = tl.arange(0, WIDTH // GROUP)
        tl.store(sums + row * groups + group, by_group, mask=group < groups)


@triton.jit
def quantize(x, order, codes, scales, sums, columns, present, slots, groups,
             WIDTH: tl.constexpr, GROUP: tl.constexpr, ORDERED: tl.constexpr):  # fmt: skip
    """One row of ``x [rows, columns]`` to ``codes [rows, slots]``, in the order of the slots, of which ``present``
    have a column (with ``ORDERED``, those that ``order`` says)."""
    row, slot = tl.program_id(0), tl.arange(0, WIDTH)
    if ORDERED:
        column = tl.load(order + slot, mask=slot < present, other=-1)
        inside = column >= 0
    else:
        column = slot
        inside = slot < present
    values = tl.load(x + row.to(tl.int64) * columns + column, mask=inside, other=0.0).to(tl.float32)
    _store_codes(values, inside, codes, scales, sums, row, slots, groups, WIDTH, GROUP)


@triton.jit
def normalize(x, residual, weight, total, y, codes, scales, sums, columns, slots, groups, epsilon,
              WIDTH: tl.constexpr, GROUP: tl.constexpr, HAS_RESIDUAL: tl.constexpr,
              QUANTIZED: tl.constexpr):  # fmt: skip
    """The root mean square norm of a row of ``x`` (``+ residual``, whose sum goes to ``total``), to ``y`` or to codes.

    In float32, rounded once to the dtype of ``x``, also before it is quantized.
    """
    row, column = tl.program_id(0), tl.arange(0, WIDTH)
    inside, at = column < columns, row.to(tl.int64) * columns + column
    values = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        values += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
        rounded = values.to(x.dtype.element_ty)
        tl.store(total + at, rounded, mask=inside)
        values = rounded.to(tl.float32)
    mean = tl.sum(values * values, axis=0) / columns
    normed = values * tl.rsqrt(mean + epsilon) * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    rounded = normed.to(x.dtype.element_ty)
    if QUANTIZED:
        _store_codes(rounded.to(tl.float32), inside, codes, scales, sums, row, slots, groups, WIDTH, GROUP)
    else:
        tl.store(y + at, rounded, mask=inside)
