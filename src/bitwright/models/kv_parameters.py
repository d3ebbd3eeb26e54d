"""The ranges of keys and values that calibration measured, kept in the model's directory, and scales made of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from bitwright.core.errors import BitwrightError
from bitwright.core.kv_scheme import KVCode, KVScheme
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.formats.directory import find_file
from bitwright.formats.safetensors_file import read_tensor, serialize
from bitwright.formats.safetensors_index import TensorEntry, read_index
from bitwright.formats.storage import write_file
from bitwright.models.embedded_model import embedded_directory
from bitwright.models.kv_ranges import Range, Ranges, static_parameters, weights_identity
from bitwright.models.kv_scales import read_scales
from bitwright.models.kv_storage import SIDES, LayerParameters, Side
from bitwright.models.location import DEMO

__all__ = ["PARAMETERS_FILE", "find_parameters", "has_parameters", "make_parameters", "read_ranges", "write_ranges"]

PARAMETERS_FILE = "kv_parameters.safetensors"
VERSION = "1"
T = TypeVar("T")


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
    """What :func:`write_ranges` wrote, else what the scales in the checkpoint say (see :mod:`.kv_scales`).

    ``model`` is where the weights are, if not there.

    Raises:
        BitwrightError: BW404 if there is nothing, if it is damaged, if it belongs to other weights, or if a layer is
            missing.
    """
    path = find_file(directory, PARAMETERS_FILE)
    if path is None:
        scales = read_scales(open_checkpoint(model or directory))
        if scales is None:
            raise _refusal(directory, "the model has no calibrated ranges of keys and values")
        if sorted(scales) != list(range(layers)):
            raise _refusal(directory, f"the checkpoint has scales of {len(scales)} of {layers} layers")
        return scales
    index = _read_parameters(directory, lambda: read_index(path))
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
        entries = [index.tensors[name] for name in names]
        parts = _read_parameters(directory, partial(_read_all, path, entries))
        parts = [part.to(torch.float32) for part in parts]
        shapes = {tuple(part.shape) for part in parts}
        is_sound = len(shapes) == 1 and parts[0].dim() == 1 and all(bool(part.isfinite().all()) for part in parts)
        if not is_sound or not all(bool((low <= high).all()) for low, high in (parts[:2], parts[2:])):
            raise _refusal(directory, f"the ranges of layer {layer} in {PARAMETERS_FILE} are damaged")
        ranges[layer] = {"key": Range(parts[0], parts[1]), "value": Range(parts[2], parts[3])}
    return ranges


def _read_parameters(directory: Path, read: Callable[[], T]) -> T:
    """Calibration makes the file of ranges: where it cannot be read, that is what to do, not to fetch it."""
    try:
        return read()
    except BitwrightError as error:
        raise _refusal(directory, f"{PARAMETERS_FILE} is damaged", error.what) from error


def _read_all(path: Path, entries: Sequence[TensorEntry]) -> list[torch.Tensor]:
    return [read_tensor(path, entry) for entry in entries]


def find_parameters(config: Any, scheme: KVScheme, layers: int) -> dict[int, LayerParameters]:
    """The parameters of a calibrated scheme, from the directory that the model of ``config`` was loaded from.

    Raises:
        BitwrightError: BW404, naming the command that makes them.
    """
    name = getattr(config, "name_or_path", "") or ""
    if not name or not os.path.isdir(name):
        raise _refusal(name, f"{scheme.name} needs calibrated ranges of keys and values")
    return make_parameters(read_ranges(Path(name), layers), scheme)


def _refusal(where: Path | str, what: str, why: str = "") -> BitwrightError:
    place, command = str(where) or "the model in memory", f"bitwright calibrate {where or 'MODEL'}"
    if place == str(embedded_directory()):  # inside the package, where nothing is written
        place, command = DEMO, f"bitwright quantize {DEMO} --output DIR, then bitwright calibrate DIR"
    suggestion = f"{command}, or a scheme that needs none, such as int8"
    return BitwrightError("BW404", what, where=place, why=why, suggestion=suggestion)
