"""Running quantized layers over all calibration samples: each weight decoded once, not once a sample."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.models.blocks import set_module
from bitwright.models.quantized import QuantizedLinear

__all__ = ["DecodedLinear", "decoded"]


class DecodedLinear(nn.Module):
    """What ``layer`` computes, from a dense copy of its weight (in ``dtype``, that of the activations).

    float16 is multiplied in float32, as the reference kernel does.
    """

    def __init__(self, layer: QuantizedLinear, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = layer.dequantize().to(torch.float32 if dtype == torch.float16 else dtype)
        self.bias, self.input_scale = layer.bias, layer.input_scale

    def forward(self, x: Tensor) -> Tensor:
        scaled = x if self.input_scale is None else (x.to(torch.float32) * self.input_scale).to(x.dtype)
        bias = None if self.bias is None else self.bias.to(self.weight.dtype)
        return functional.linear(scaled.to(self.weight.dtype), self.weight, bias).to(x.dtype)


@contextmanager
def decoded(model: nn.Module, dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
    """Let quantized layers of ``model`` run from dense weights; those that quantize activations stay.

    ``dtypes``: of the activations of each layer, by name. Layers that are not quantized are left alone.
    """
    modules = {name: model.get_submodule(name) for name in dtypes}
    layers = {name: layer for name, layer in modules.items() if isinstance(layer, QuantizedLinear)}
    chosen = {name: layer for name, layer in layers.items() if layer.scheme.activation is None}
    for name, layer in chosen.items():
        set_module(model, name, DecodedLinear(layer, dtypes[name]))
    try:
        yield
    finally:
        for name, layer in chosen.items():
            set_module(model, name, layer)
