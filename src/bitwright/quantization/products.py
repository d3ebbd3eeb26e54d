"""The products of a float32 layer that is being tuned, forward and backward, in the form that is multiplied fastest.

torch leaves float32 products to MKL, which on some processors takes twice as long as oneDNN
(:mod:`bitwright.quantization.hessian_products`); those of bf16 are oneDNN's already.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from bitwright.quantization.hessian_products import product

__all__ = ["multiply"]

SMALL = 1 << 24  # multiplications below which autograd's own products are as fast


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x weightT + bias`` of ``[..., in]``, ``[out, in]`` and ``[out]``, of one dtype: ``[..., out]``.

    It has first derivatives for all three.
    """
    if x.device.type != "cpu" or x.numel() * weight.shape[0] < SMALL or x.dtype != torch.float32:
        return functional.linear(x, weight, bias)
    found = _Multiply.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    assert isinstance(found, Tensor)
    return found


class _Multiply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        found = product(_flat(x).contiguous(), weight).view(*x.shape[:-1], -1)
        return found if bias is None else found.add_(bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        by_x, by_weight, rows = None, None, _flat(grad).contiguous()
        if ctx.needs_input_grad[0]:
            by_x = product(rows, weight.t()).view(x.shape)
        if ctx.needs_input_grad[1]:
            by_weight = product(rows.t().contiguous(), _flat(x).t())
        return by_x, by_weight, rows.sum(0) if ctx.needs_input_grad[2] else None


def _flat(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1])
