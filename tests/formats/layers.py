"""Quantized layers and small checkpoints for the tests of the formats."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from bitwright.core.grid import FitOptions
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme
from bitwright.core.scheme_names import parse
from bitwright.formats.checkpoint import Checkpoint, open_checkpoint
from bitwright.formats.records import Format, LayerRecord
from bitwright.formats.safetensors_file import serialize
from bitwright.formats.storage import write_file
from bitwright.formats.table import find_format

__all__ = ["decode_all", "make_layer", "random_layer", "same_tensor", "scratch_directory", "write_checkpoint"]

Layer = tuple[QuantizedTensor, LayerScheme]


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """An empty directory, in memory if there is such a place: for tests that write thousands of small files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def make_layer(name: str, shape: tuple[int, int], *, seed: int = 0, options: FitOptions | None = None) -> Layer:
    """A layer of normal numbers, rounded to nearest in the scheme called ``name``."""
    scheme = parse(name)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return QuantizedTensor.quantize(values, scheme.weight, options), scheme


def random_layer(name: str, shape: tuple[int, int], *, seed: int = 0) -> Layer:
    """A layer of any codes, zero points and positive scales at all, as no fit would give them."""
    scheme = parse(name)
    weight = scheme.weight
    generator = torch.Generator().manual_seed(seed)

    def draw(size: tuple[int, int]) -> Tensor:
        codes = torch.randint(weight.code_min, weight.code_max + 1, size, generator=generator)
        return codes.to(weight.code_dtype)

    size, other = shape[weight.axis], shape[1 - weight.axis]
    groups = 1 if weight.group is None else -(-size // weight.group)
    expected = (other, groups) if weight.axis == 1 else (groups, other)
    scale = (torch.rand(expected, generator=generator) + 0.01).to(weight.scale_dtype)
    zero = None if weight.symmetric else draw(expected)
    if zero is not None and weight.zero == "float":
        zero = (torch.rand(expected, generator=generator) * 9).to(weight.scale_dtype)
    return QuantizedTensor(scheme=weight, codes=draw(shape), scale=scale, zero=zero), scheme


def write_checkpoint(directory: Path, written: Format, layers: Mapping[str, Layer]) -> Checkpoint:
    """Write ``layers`` as a checkpoint of one file, and open it."""
    tensors: dict[str, Tensor] = {}
    for name, (tensor, scheme) in layers.items():
        tensors |= written.encode(name, tensor, scheme)
    records = {name: LayerRecord(scheme, tensor.shape) for name, (tensor, scheme) in layers.items()}
    directory.mkdir(parents=True, exist_ok=True)
    write_file(directory / "model.safetensors", serialize(tensors))
    config = {"model_type": "llama", "quantization_config": written.config(records, ["lm_head"])}
    write_file(directory / "config.json", [json.dumps(config).encode()])
    return open_checkpoint(directory)


def decode_all(checkpoint: Checkpoint) -> dict[str, QuantizedTensor]:
    """Every quantized layer of a checkpoint, by whichever format it is in."""
    found = find_format(checkpoint.quantization or {})
    return {name: found.decode(checkpoint, name, record) for name, record in found.layers(checkpoint).items()}


def same_tensor(left: QuantizedTensor, right: QuantizedTensor) -> bool:
    """Whether two tensors are equal in every bit and dtype."""
    if left.scheme != right.scheme or not _equal(left.codes, right.codes) or not _equal(left.zero, right.zero):
        return False
    if isinstance(left.scale, QuantizedTensor) or isinstance(right.scale, QuantizedTensor):
        both = isinstance(left.scale, QuantizedTensor) and isinstance(right.scale, QuantizedTensor)
        return both and same_tensor(left.scale, right.scale)
    return _equal(left.scale, right.scale) and _equal(left.group_index, right.group_index)


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return left.dtype == right.dtype and torch.equal(left, right)
