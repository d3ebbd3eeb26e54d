"""The linear layer that runs from packed codes and keeps no dense copy of its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme
from bitwright.kernels.table import Kernel, KernelSpec, PackedWeight, select

__all__ = ["QuantizedLinear"]


class QuantizedLinear(nn.Module):
    """``y = (x * input_scale) Wᵀ + bias`` with ``W`` (``[out, in]``) in the packing of the kernel that runs it.

    The packed tensors are buffers, so that devices and state dicts see them, but a change of the model's dtype leaves
    them alone, and ``input_scale`` too: a rounded scale would be another weight. The output has the dtype of the input.

    ``input_scale`` (``[in]``, float32, or ``None``) is what an equalization could not fold into the layer before: the
    columns of the weight are divided by it already.
    """

    input_scale: Tensor | None

    def __init__(
        self, weight: PackedWeight, bias: Tensor | None, kernel: Kernel, input_scale: Tensor | None = None
    ) -> None:
        super().__init__()
        self.scheme, self.kernel = weight.scheme, kernel
        self.out_features, self.in_features = weight.shape
        self._register(weight)
        self.register_buffer("input_scale", input_scale)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def _register(self, weight: PackedWeight) -> None:
        self._packed_names: dict[str, str] = {}
        for name, tensor in weight.tensors.items():
            buffer = "packed_" + name.replace(".", "_")
            self._packed_names[buffer] = name
            self.register_buffer(buffer, tensor)

    @classmethod
    def build(
        cls, tensor: QuantizedTensor, bias: Tensor | None, scheme: LayerScheme, input_scale: Tensor | None = None
    ) -> QuantizedLinear:
        """Pack ``tensor`` (whose scheme is ``scheme.weight``) for the first kernel that accepts the layer.

        Raises:
            BitwrightError: BW206 if no kernel does.
            ValueError: if the tensor is not of the scheme, the bias is not ``[out]``, or the input scale is not
                float32 ``[in]``.
        """
        if bias is not None and tuple(bias.shape) != tensor.shape[:1]:
            raise ValueError(f"a bias of shape {list(bias.shape)} for {tensor.shape[0]} output features")
        if input_scale is not None and (
            tuple(input_scale.shape) != tensor.shape[1:] or input_scale.dtype != torch.float32
        ):
            found = f"{input_scale.dtype} {list(input_scale.shape)}"
            raise ValueError(f"an input scale of {found} for {tensor.shape[1]} input features; float32 is called for")
        kernel = select(KernelSpec(scheme=scheme, shape=tensor.shape, device=tensor.codes.device))
        return cls(kernel.pack(tensor, scheme), bias, kernel, input_scale)

    @property
    def packed(self) -> PackedWeight:
        """The operand, as the kernel takes it; its tensors are this module's buffers."""
        buffers = ((name, self._buffers[buffer]) for buffer, name in self._packed_names.items())
        tensors = {name: tensor for name, tensor in buffers if tensor is not None}
        return PackedWeight(scheme=self.scheme, shape=(self.out_features, self.in_features), tensors=tensors)

    def forward(self, x: Tensor) -> Tensor:
        """``x [..., in]`` to ``[..., out]``, same dtype."""
        if self.input_scale is not None:
            x = (x.to(torch.float32) * self.input_scale).to(x.dtype)
        return self.kernel.run(x, self.packed, self.bias)

    def unpack(self) -> QuantizedTensor:
        """The weight as the canonical tensor, equal to the one that was packed."""
        return self.kernel.unpack(self.packed)

    def dequantize(self) -> Tensor:
        """The weight as float32 ``[out, in]``, made anew at each call."""
        return self.unpack().dequantize()

    def resident_bytes(self) -> int:
        """The bytes that the packed weight takes in memory, without bias and input scale."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.packed.tensors.values())

    def extra_repr(self) -> str:
        shape = f"in={self.in_features}, out={self.out_features}, bias={self.bias is not None}"
        scaled = "" if self.input_scale is None else ", input_scale=True"
        return f"{shape}, scheme={self.scheme.name}, kernel={self.kernel.name}{scaled}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Let the packed tensors follow to another device, never to another dtype; there another kernel may run."""
        exact, packed, kernel = dict(self._buffers), self.packed, self.kernel
        module = super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = self._buffers[name]
            if buffer is not None and moved is not None and moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        self._pack_again(packed, kernel)
        return module

    def _pack_again(self, packed: PackedWeight, kernel: Kernel) -> None:
        """After a move to a device of another type: the operand of the kernel that is first there."""
        here, there = (next(iter(each.tensors.values())).device for each in (packed, self.packed))
        if here.type == there.type or "meta" in (here.type, there.type):
            return
        self.kernel = select(KernelSpec(scheme=self.scheme, shape=packed.shape, device=there))
        if self.kernel is kernel:
            return
        for buffer in self._packed_names:
            del self._buffers[buffer]
        self._register(self.kernel.pack(kernel.unpack(packed).to(there), self.scheme))
