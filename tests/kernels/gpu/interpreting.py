"""Triton's interpreter, taught to compute with bfloat16: it keeps those numbers as their bits, and would add the bits.

The tests' configuration has it interpret (``TRITON_INTERPRET``), before anything imports it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from triton import language as tl
from triton.runtime import interpreter

__all__ = ["dot_in_place", "narrow", "teach_bfloat16", "widen"]


def widen(bits: Any) -> Any:
    """The float32 numbers of bfloat16 bits (uint16)."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def narrow(numbers: Any) -> Any:
    """The bits (uint16) of float32 numbers rounded to bfloat16, half to even."""
    bits = np.ascontiguousarray(numbers, dtype=np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(numbers), 0x7FC0, rounded).astype(np.uint16)


def teach_bfloat16() -> None:
    """Let sums, products, comparisons and matrix products of bfloat16 be those of the numbers."""
    builder = interpreter.InterpreterBuilder
    if getattr(builder, "knows_bfloat16", False):
        return
    binary, dot, cast = builder.binary_op, builder.create_dot, builder.cast_impl

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar == dst_type.scalar:
            return cast(self, src, dst_type)
        if src.dtype.scalar == tl.bfloat16:
            src = interpreter.TensorHandle(widen(src.data), tl.float32)
        if dst_type.scalar == tl.bfloat16:  # it would cut the lower bits off
            return interpreter.TensorHandle(narrow(src.data.astype(np.float32)), tl.bfloat16)
        return cast(self, src, dst_type)

    def binary_op(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar != tl.bfloat16:
            return binary(self, lhs, rhs, op)
        result = op(widen(lhs.data), widen(rhs.data))
        if result.dtype == np.bool_:
            return interpreter.TensorHandle(result, tl.int1)
        return interpreter.TensorHandle(narrow(result), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, imprecise: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return dot(self, a, b, d, input_precision, imprecise)
        a, b = (interpreter.TensorHandle(widen(each.data), tl.float32) for each in (a, b))
        return dot(self, a, b, d, input_precision, imprecise)

    builder.binary_op, builder.create_dot, builder.cast_impl = binary_op, create_dot, cast_impl
    builder.knows_bfloat16 = True


def dot_in_place(self: Any, a: Any, b: Any, d: Any, input_precision: Any, imprecise: Any) -> Any:
    """A product of float32 or whole numbers in which a row's sums do not depend on where the row is, as on a GPU; those
    of a processor do. Stands in for ``InterpreterBuilder.create_dot``."""
    products = a.data[:, :, None].astype(d.data.dtype) * b.data[None].astype(d.data.dtype)
    return interpreter.TensorHandle(products.sum(1, dtype=d.data.dtype) + d.data, d.dtype.scalar)
