"""What lies between two products of a gated network."""

import triton
import triton.language as tl

__all__ = ["silu_multiply"]


@triton.jit
def silu_multiply(gate, up, y, columns, gate_stride, up_stride, BLOCK: tl.constexpr):
    """``gate * sigmoid(gate) * up`` of a part of one row, in float32, rounded once."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < columns
    left = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    right = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    found = left / (1.0 + tl.exp(-left)) * right
    tl.store(y + row * columns + column, found.to(y.dtype.element_ty), mask=inside)
