"""What a model takes on disk or in memory, and how many bits that is for each weight."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from bitwright.formats.checkpoint import Checkpoint
from bitwright.formats.table import find_format
from bitwright.models.quantized import QuantizedLinear

__all__ = ["Size", "checkpoint_size", "module_size"]


@dataclass(frozen=True, slots=True)
class Size:
    """``total``: bytes of all weights. Bits per weight, scales and zero points included: ``bits_per_weight`` over the
    quantized linear layers (over all weights if none is quantized), ``bits_per_parameter`` over all weights."""

    total: int
    bits_per_weight: float
    bits_per_parameter: float


def checkpoint_size(checkpoint: Checkpoint) -> Size:
    """The size of the weight files of a checkpoint.

    Raises:
        BitwrightError: BW311 if its quantization record cannot be read.
    """
    quantization = checkpoint.quantization
    layers = {} if quantization is None else find_format(quantization).layers(checkpoint)
    weights = {name: record.shape[0] * record.shape[1] for name, record in layers.items()}
    quantized_bytes = other_bytes = others = 0
    for name, stored in checkpoint.tensors.items():
        size = stored.entry.nbytes
        owner, _, leaf = name.rpartition(".")
        while owner and owner not in weights:  # a tensor of doubly quantized scales has a longer name
            owner = owner.rpartition(".")[0]
        if owner and not (leaf == "bias" and name == f"{owner}.bias"):
            quantized_bytes += size
        else:
            other_bytes += size
            others += _count(stored.entry.shape)
    return _size(sum(checkpoint.files.values()), quantized_bytes, sum(weights.values()), other_bytes, others)


def module_size(model: nn.Module) -> Size:
    """The size of the weights of a model in memory; a tied weight counts once."""
    quantized_bytes = quantized = 0
    for module in model.modules():
        if isinstance(module, QuantizedLinear):
            quantized_bytes += module.resident_bytes()
            quantized += module.out_features * module.in_features
    parameters = list(model.parameters())
    other_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    others = sum(parameter.numel() for parameter in parameters)
    return _size(quantized_bytes + other_bytes, quantized_bytes, quantized, other_bytes, others)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return count


def _size(total: int, quantized_bytes: int, quantized: int, other_bytes: int, others: int) -> Size:
    per_parameter = 8 * (quantized_bytes + other_bytes) / max(1, quantized + others)
    return Size(total, 8 * quantized_bytes / quantized if quantized else per_parameter, per_parameter)
