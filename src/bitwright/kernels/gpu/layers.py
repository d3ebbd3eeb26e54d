"""Linear layers as a decoder on the GPU calls them: fused where several read one input, norms included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.core.qtensor import QuantizedTensor
from bitwright.kernels.gpu import fp8, integer, linear, tokens
from bitwright.kernels.records import Kernel, PackedWeight

__all__ = ["RECORDED", "TILE", "Norm", "Product", "dense_product", "in_tiles", "join_rows", "packed_product"]

RECORDED = (linear.KERNEL, integer.KERNEL, fp8.KERNEL)  # which never wait for the GPU, so that a graph can hold them
TILE = 64  # rows of a dense product whose order of sums must not depend on how many there are


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


def in_tiles(run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``run`` on ``TILE`` rows of ``x`` (``[rows, ...]``) at a time, zeros after the last ones.

    The vendor's products choose their order of sums by their sizes: where those are always alike, so are a row's sums.
    """
    rows = x.shape[0]
    padded = functional.pad(x, (0, 0) * (x.dim() - 1) + (0, -rows % TILE))
    return torch.cat([run(tile) for tile in torch.split(padded, TILE)])[:rows] if rows else run(x)


def dense_product(weight: Tensor, bias: Tensor | None, sizes: tuple[int, ...], *, invariant: bool = False) -> Product:
    """Of a weight ``[sum of sizes, in]`` that is not quantized; ``invariant``: a row's result in any company."""

    def run(x: Tensor) -> Tensor:
        return functional.linear(x, weight, bias)

    return _product(sizes, (lambda x: in_tiles(run, x)) if invariant else run)


def packed_product(
    kernel: Kernel, weight: PackedWeight, bias: Tensor | None, sizes: tuple[int, ...], *, invariant: bool = False
) -> Product:
    """Of a packed weight. Where the kernel quantizes its tokens, the norm before it does. ``invariant`` as above."""
    if kernel is linear.KERNEL:
        return _product(sizes, lambda x: linear.run(x, weight, bias, invariant=invariant))
    if kernel is fp8.KERNEL:
        return _product(sizes, lambda x: fp8.run(x, weight, bias, invariant=invariant))
    if kernel is not integer.KERNEL:
        return _product(sizes, lambda x: in_tiles(lambda y: kernel.run(y, weight, bias), x)
                        if invariant else kernel.run(x, weight, bias))  # fmt: skip

    def run(x: Tensor) -> Tensor:
        return integer.run(x, weight, bias, invariant=invariant)

    if "order" in weight.tensors:
        return _product(sizes, run)
    layout = integer.token_layout(weight)

    def run_normed(x: Tensor, norm: Norm, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        codes, total = tokens.norm_tokens(x, norm.weight, norm.epsilon, layout, residual)
        return integer.multiply(codes, weight, bias, x.dtype, invariant=invariant), total

    return Product(sizes, run, run_normed)


def _product(sizes: tuple[int, ...], run: Callable[[Tensor], Tensor]) -> Product:
    def run_normed(x: Tensor, norm: Norm, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        y, total = tokens.rms_norm(x, norm.weight, norm.epsilon, residual)
        return run(y), total

    return Product(sizes, run, run_normed)
