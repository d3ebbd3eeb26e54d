"""Linear layers as a decoder on the GPU calls them: fused where several read one input, norms included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.core.qtensor import QuantizedTensor
from bitwright.kernels.gpu import integer, tokens
from bitwright.kernels.records import Kernel, PackedWeight

__all__ = ["Norm", "Product", "dense_product", "join_rows", "packed_product"]


@dataclass(frozen=True, slots=True)
class Norm:
    """A root mean square norm."""

    weight: Tensor
    epsilon: float


@dataclass(frozen=True, slots=True)
class Product:
    """Some linear layers that read one input, as one.

    Attributes:
        sizes: output features of each.
        run: ``x [rows, in]`` to ``[rows, sum of sizes]``.
        run_normed: the same of a norm of ``x`` plus a residual; and that sum.
    """

    sizes: tuple[int, ...]
    run: Callable[[Tensor], Tensor]
    run_normed: Callable[[Tensor, Norm, Tensor | None], tuple[Tensor, Tensor]]


def join_rows(parts: Sequence[QuantizedTensor]) -> QuantizedTensor | None:
    """Weights of one scheme one below the other, or ``None`` where their columns or scales are not apart."""
    first = parts[0]
    for each in parts:
        if each.scheme != first.scheme or each.scheme.axis != 1 or each.group_index is not None:
            return None
        if not isinstance(each.scale, Tensor) or not isinstance(first.scale, Tensor):
            return None
        if each.scale.dtype != first.scale.dtype or (each.zero is not None and each.zero.dtype != first.zero.dtype):  # type: ignore[union-attr]
            return None
    scale = torch.cat([each.scale for each in parts if isinstance(each.scale, Tensor)])
    zeros = [each.zero for each in parts if each.zero is not None]
    codes = torch.cat([each.codes for each in parts])
    return QuantizedTensor(scheme=first.scheme, codes=codes, scale=scale, zero=torch.cat(zeros) if zeros else None)


def dense_product(weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...]) -> Product:
    """Of a weight ``[sum of sizes, in]`` that is not quantized."""
    return _product(sizes, lambda x: functional.linear(x, weight, bias))


def packed_product(kernel: Kernel, weight: PackedWeight, bias: Tensor | None, sizes: tuple[int, ...]) -> Product:
    """Of a packed weight. Where the kernel quantizes its tokens, the norm before it does."""
    if kernel is not integer.KERNEL or "order" in weight.tensors:
        return _product(sizes, lambda x: kernel.run(x, weight, bias))
    layout = integer.token_layout(weight)

    def run_normed(x: Tensor, norm: Norm, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        codes, total = tokens.norm_tokens(x, norm.weight, norm.epsilon, layout, residual)
        return integer.multiply(codes, weight, bias, x.dtype), total

    return Product(sizes, lambda x: kernel.run(x, weight, bias), run_normed)


def _product(sizes: tuple[int, ...], run: Callable[[Tensor], Tensor]) -> Product:
    def run_normed(x: Tensor, norm: Norm, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        y, total = tokens.rms_norm(x, norm.weight, norm.epsilon, residual)
        return run(y), total

    return Product(sizes, run, run_normed)
