"""The ranges of keys and values that calibration measured, kept in the model's directory, and scales made of them."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.core.kv_codes import StaticParameters
from bitwright.core.kv_scheme import KVCode, KVScheme
from bitwright.formats.checkpoint import Checkpoint, open_checkpoint
from bitwright.formats.directory import find_file
from bitwright.formats.safetensors_file import read_tensor, serialize
from bitwright.formats.safetensors_index import read_index
from bitwright.formats.storage import write_file
from bitwright.models.kv_storage import SIDES, LayerParameters, Side

__all__ = [
    "PARAMETERS_FILE", "Range", "Ranges", "find_parameters", "has_parameters", "make_parameters", "read_ranges",
    "static_parameters", "weights_identity", "write_ranges",
]  # fmt: skip

PARAMETERS_FILE = "kv_parameters.safetensors"
VERSION = "1"
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


def make_parameters(ranges: Mapping[int, Ranges], scheme: KVScheme) -> dict[int, LayerParameters]:
    """The parameters of every calibrated layer of ``scheme``."""
    made: dict[int, LayerParameters] = {}
    for layer, found in ranges.items():
        own = scheme.at(layer)
        codes: dict[Side, KVCode] = {"key": own.key, "value": own.value}
        made[layer] = {side: static_parameters(found[side], codes[side]) for side in SIDES if codes[side].is_static}
    return made


def write_ranges(directory: Path, ranges: Mapping[int, Ranges], notes: Mapping[str, Any], *, weights: str) -> str:
    """Write the ranges of all layers, of a model with ``weights`` (see :func:`weights_identity`); returns the name."""
    tensors = {
        f"layers.{layer}.{side}.{end}": getattr(found[side], end)
        for layer, found in ranges.items()
        for side in SIDES
        for end in ("low", "high")
    }
    metadata = {"version": VERSION, "weights": weights, "calibration": json.dumps(dict(notes), sort_keys=True)}
    write_file(directory / PARAMETERS_FILE, serialize(tensors, metadata))
    return PARAMETERS_FILE


def has_parameters(directory: Path) -> bool:
    """Whether the model was calibrated."""
    return find_file(directory, PARAMETERS_FILE) is not None


def read_ranges(directory: Path, layers: int, *, model: Path | None = None) -> dict[int, Ranges]:
    """What :func:`write_ranges` wrote; ``model`` is where the weights are, if not there.

    Raises:
        BitwrightError: BW404 if there is nothing, if it belongs to other weights, or if a layer is missing.
    """
    path = find_file(directory, PARAMETERS_FILE)
    if path is None:
        raise _refusal(directory, "the model has no calibrated ranges of keys and values")
    index = read_index(path)
    if index.metadata.get("version") != VERSION:
        raise _refusal(directory, f"{PARAMETERS_FILE} has version {index.metadata.get('version')!r}, not {VERSION!r}")
    if index.metadata.get("weights") != weights_identity(open_checkpoint(model or directory)):
        why = "quantizing or smoothing weights rescales keys and values; old ranges would clip them"
        raise _refusal(directory, f"{PARAMETERS_FILE} was calibrated for other weights than those beside it", why)
    ranges: dict[int, Ranges] = {}
    for layer in range(layers):
        names = [f"layers.{layer}.{side}.{end}" for side in SIDES for end in ("low", "high")]
        if any(name not in index.tensors for name in names):
            raise _refusal(directory, f"{PARAMETERS_FILE} has no ranges for layer {layer}")
        parts = [read_tensor(path, index.tensors[name]).to(torch.float32) for name in names]
        shapes = {tuple(part.shape) for part in parts}
        if len(shapes) != 1 or parts[0].dim() != 1 or not all(bool(part.isfinite().all()) for part in parts):
            raise _refusal(directory, f"the ranges of layer {layer} in {PARAMETERS_FILE} are damaged")
        ranges[layer] = {"key": Range(parts[0], parts[1]), "value": Range(parts[2], parts[3])}
    return ranges


def find_parameters(config: Any, scheme: KVScheme, layers: int) -> dict[int, LayerParameters]:
    """The parameters of a calibrated scheme, from the directory that the model of ``config`` was loaded from.

    Raises:
        BitwrightError: BW404, naming the command that makes them.
    """
    name = getattr(config, "name_or_path", "") or ""
    if not name or not os.path.isdir(name):
        raise _refusal(name or "the model in memory", f"{scheme.name} needs calibrated ranges of keys and values")
    return make_parameters(read_ranges(Path(name), layers), scheme)


def weights_identity(checkpoint: Checkpoint) -> str:
    """A sha256 of every tensor's name, dtype and shape, and of bytes from sixteen places of it."""
    digest = hashlib.sha256()
    files = {file: os.open(checkpoint.directory / file, os.O_RDONLY | os.O_CLOEXEC) for file in checkpoint.files}
    try:
        for name in sorted(checkpoint.tensors):
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


def _refusal(where: Path | str, what: str, why: str = "") -> BitwrightError:
    suggestion = f"bitwright calibrate {where}, or a scheme that needs none, such as int8"
    return BitwrightError("BW404", what, where=str(where), why=why, suggestion=suggestion)
