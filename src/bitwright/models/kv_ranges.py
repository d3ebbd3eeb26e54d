"""Ranges of keys and values that calibration measures, the scales made of them, and whose weights they belong to."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.core.kv_codes import StaticParameters
from bitwright.core.kv_scheme import KVCode
from bitwright.formats.checkpoint import Checkpoint
from bitwright.models.kv_storage import Side
from bitwright.models.names import CACHE_SCALE

__all__ = ["FP8_MAX", "Range", "Ranges", "static_parameters", "weights_identity"]

SLICES, SLICE = 16, 256  # places of a tensor that its identity rests on, and bytes of each
TINY = torch.finfo(torch.float32).tiny
FP8_MAX = 448.0


@dataclass(frozen=True, slots=True)
class Range:
    """The least and greatest key, or value, of each head of a layer over the calibration text: float32 ``[heads]``."""

    low: Tensor
    high: Tensor


Ranges = dict[Side, Range]


def static_parameters(found: Range, code: KVCode) -> StaticParameters:
    """Scale and zero point of a calibrated code.

    ``zero_point = (min + max) / 2``, ``scale = (max - min) / 255``; symmetric: ``scale = absmax / 127``, and of fp8
    ``absmax / 448``. One of the whole layer, or one a head.
    """
    low, high = found.low, found.high
    if code.grain == "static_layer":
        low, high = low.amin().view(1), high.amax().view(1)
    largest = torch.maximum(low.abs(), high.abs())
    if code.symmetric:
        scale, zero_point = largest / (FP8_MAX if code.kind == "fp8" else 127), torch.zeros_like(low)
    else:
        scale, zero_point = (high / 2 - low / 2) / 127.5, low / 2 + high / 2
    return StaticParameters(scale.clamp(min=TINY), zero_point)


def weights_identity(checkpoint: Checkpoint) -> str:
    """A sha256 of every tensor's name, dtype and shape, and of bytes from sixteen places of it.

    Scales of keys and values are no weights.
    """
    digest = hashlib.sha256()
    files = {file: os.open(checkpoint.directory / file, os.O_RDONLY | os.O_CLOEXEC) for file in checkpoint.files}
    try:
        for name in sorted(name for name in checkpoint.tensors if not CACHE_SCALE.fullmatch(name)):
            stored = checkpoint.tensors[name]
            entry = stored.entry
            digest.update(f"{name}:{entry.dtype}:{list(entry.shape)}".encode())
            step = max(SLICE, (entry.end - entry.start) // SLICES)
            for start in range(entry.start, entry.end, step):
                digest.update(os.pread(files[stored.file], min(SLICE, entry.end - start), start))
    finally:
        for descriptor in files.values():
            os.close(descriptor)
    return digest.hexdigest()
