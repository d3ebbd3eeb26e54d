"""What a kernel is: four functions, and the operand that they pass between them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme

__all__ = ["Kernel", "KernelSpec", "PackedWeight"]


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSpec:
    """What a linear layer asks of a kernel: its scheme, its shape ``(out, in)`` and where it runs."""

    scheme: LayerScheme
    shape: tuple[int, int]
    device: torch.device


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedWeight:
    """The weight of one layer as its kernel wants it: named tensors, whose names and layouts only the kernel knows."""

    scheme: LayerScheme
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One row of the table.

    Attributes:
        name: what ``inspect`` prints.
        refuse: why the kernel cannot run a layer, or ``None`` if it can.
        pack: the operand of a weight; what it keeps does not share memory with the weight's codes.
        unpack: the inverse of ``pack``, without loss.
        run: ``(x [..., in], weight, bias [out] or None) -> y [..., out]`` in the dtype of ``x``.
    """

    name: str
    refuse: Callable[[KernelSpec], str | None]
    pack: Callable[[QuantizedTensor, LayerScheme], PackedWeight]
    unpack: Callable[[PackedWeight], QuantizedTensor]
    run: Callable[[Tensor, PackedWeight, Tensor | None], Tensor]
