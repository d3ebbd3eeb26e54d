"""The products of a layer that is being tuned, forward and backward, each in the form that is multiplied fastest.

oneDNN reaches its best rate where both factors lie along the dimension that is summed over. A backward pass has no such
factors as they come: with copies that do, forward and backward of bf16 matrices take 1 to 4% less, and float32 ones,
which torch leaves to MKL, half the time on some processors (:mod:`bitwright.quantization.hessian_products`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from bitwright.quantization.hessian_products import multiplies_bfloat16, product

__all__ = ["multiply"]

SMALL = 1 << 24  # multiplications below which autograd's own products are as fast


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weightT + bias`` of ``[..., in]``, ``[out, in]`` and ``[out]``, of one dtype: ``[..., out]``.

    It has first derivatives for all three.
    """
    if x.device.type != "cpu" or x.numel() * weight.shape[0] < SMALL or not _has_fast_products(x.dtype):
        return functional.linear(x, weight, bias)
    found = _Multiply.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    assert isinstance(found, Tensor)
    return found


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _times(_flat(x), weight, bias).view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, rows = None, None, _flat(grad)
        if ctx.needs_input_grad[0]:
            by_x = _times(rows, weight.t()).view(x.shape)
        if ctx.needs_input_grad[1]:
            by_weight = _times(rows.t(), _flat(x).t())
        return by_x, by_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def _times(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """``left @ right.T + bias`` of ``[m, k]`` and ``[n, k]``."""
    if left.dtype == torch.bfloat16:
        return functional.linear(left.contiguous(), right.contiguous(), bias)
    found = product(left.contiguous(), right)
    return found if bias is None else found.add_(bias)


def _flat(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])


def _has_fast_products(dtype: torch.dtype) -> bool:
    return dtype == torch.float32 or (dtype == torch.bfloat16 and multiplies_bfloat16())
