"""HQQ by its authors: half-quadratic quantization, float zero points, groups along the input."""

from __future__ import annotations

import importlib.metadata

import torch
from hqq.core.quantize import Quantizer
from torch import Tensor, nn

from benchmarks.peers.driving import Cell, Refusal, block_linears

__all__ = ["METHODS", "quantize", "versions"]

METHODS = ("hqq",)


def quantize(model: nn.Module, cell: Cell) -> dict[str, Tensor]:
    """Each layer through ``Quantizer.quantize`` with the defaults of ``BaseQuantizeConfig`` (axis 1)."""
    if cell.code != "int" or cell.symmetric:
        raise Refusal(f"HQQ has a float zero point: no {'symmetric' if cell.symmetric else cell.code} scheme")
    for layer in block_linears(model).values():
        codes, meta = Quantizer.quantize(
            layer.weight.data,
            nbits=cell.bits,
            group_size=cell.group or layer.in_features,  # None fails at three bits
            axis=1,
            compute_dtype=torch.float32,
            device="cpu",
        )
        layer.weight.data = Quantizer.dequantize(codes, meta).reshape(layer.weight.shape)
    return model.state_dict()


def versions() -> str:
    return f"hqq {importlib.metadata.version('hqq')}"
