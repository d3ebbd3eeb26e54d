"""``k_scale`` and ``v_scale`` of compressed-tensors checkpoints, and the ``kv_cache_scheme`` that tells of them.

``NAME.self_attn.k_scale`` and ``.v_scale`` hold one number a layer (``[1]``) or one a head (``[kv_heads, 1, 1]``), by
which keys after the rotary embedding, and values, are divided before they are rounded: to 8-bit floats (e4m3), as vLLM
stores them, or to 8-bit integers. Ours remember the weights that they belong to, in the metadata of their file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Set
from typing import Any

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.kv_scheme import KVCode
from bitwright.formats.checkpoint import CONFIG, INDEX, SINGLE, Checkpoint
from bitwright.formats.checksums import CHECKSUMS, listed_files, serialize_checksums
from bitwright.formats.directory import find_file, read_object
from bitwright.formats.safetensors_file import TensorSource, serialize
from bitwright.formats.safetensors_index import read_index
from bitwright.formats.storage import remove_file, write_file
from bitwright.formats.stored import read_checked
from bitwright.models.kv_ranges import FP8_MAX, Range, Ranges, static_parameters, weights_identity
from bitwright.models.kv_storage import Side
from bitwright.models.names import CACHE_SCALE

__all__ = ["SCALES_FILE", "SCALE_CODES", "attention_names", "read_scales", "write_scales"]

SCALES_FILE = "model-kv-scales.safetensors"
METHOD = "compressed-tensors"
SCALE_CODES = {
    "fp8": KVCode(bits=8, kind="fp8", grain="static_layer", symmetric=True),
    "int8": KVCode(bits=8, grain="static_layer", symmetric=True),
}
GREATEST = {"fp8": FP8_MAX, "int8": 127.0}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIMIT = 32 << 20
IDENTITY = "kv_weights"  # in the metadata of a file with scales
ATTENTION = re.compile(r"(?P<name>(?:.*\.)?layers\.(?P<layer>\d{1,4})\.self_attn)\.(?:k_proj|qkv_proj)\..*")
FIELDS: tuple[tuple[Side, str], ...] = (("key", "k_scale"), ("value", "v_scale"))


def write_scales(checkpoint: Checkpoint, ranges: Mapping[int, Ranges], kind: str) -> tuple[str, ...]:
    """Put the scales of calibrated ``ranges`` into a compressed-tensors checkpoint; returns the files written.

    ``config.json`` and, where there is one, the list of sha256 sums are brought up to date. A checkpoint of a single
    file is written anew with them; one of shards gets a shard more, and its index, from which loaders go. Wherever this
    is interrupted, the checkpoint can be loaded: shards that hold scales of an earlier writer are written without them
    under another name, the index goes over to all new files at once, and what it named before is removed last.

    Raises:
        ArgumentError: BW201 for another ``kind`` than those of ``SCALE_CODES``, and for a checkpoint of another format
            or whose attention is not called as vLLM expects.
    """
    names = attention_names(checkpoint, kind)
    if set(names) != set(ranges):
        raise _refusal(f"scales of layers {sorted(ranges)} have no place beside attention in {sorted(names)}")
    code = SCALE_CODES[kind]
    scales: dict[str, Tensor | TensorSource] = {
        f"{names[layer]}.{field}": static_parameters(found[side], code).scale
        for layer, found in ranges.items()
        for side, field in FIELDS
    }
    metadata = {**checkpoint.metadata, IDENTITY: weights_identity(checkpoint)}
    left: set[str] = set()
    if set(checkpoint.files) == {SINGLE}:
        kept = {name: checkpoint.source(name) for name in checkpoint.tensors if not CACHE_SCALE.fullmatch(name)}
        hashes = {SINGLE: write_file(checkpoint.directory / SINGLE, serialize({**kept, **scales}, metadata))}
    else:
        hashes, left = _write_shard(checkpoint, scales, metadata)
    config = read_object(checkpoint.directory / CONFIG, code="BW307", limit=LIMIT)
    config["quantization_config"]["kv_cache_scheme"] = {
        "num_bits": 8,
        "type": "float" if kind == "fp8" else "int",
        "symmetric": True,
        "strategy": "tensor",
        "dynamic": False,
    }
    hashes[CONFIG] = write_file(checkpoint.directory / CONFIG, _json(config))
    _renew_checksums(checkpoint, hashes, left)
    for file in sorted(left):
        remove_file(checkpoint.directory / file)
    return tuple(hashes)


def attention_names(checkpoint: Checkpoint, kind: str) -> dict[int, str]:
    """The names of the attention modules by layer, where :func:`write_scales` can be called.

    Raises:
        ArgumentError: as :func:`write_scales`.
    """
    if kind not in SCALE_CODES:
        what = f"kv_cache_scheme is {kind!r}"
        raise ArgumentError("BW201", what, suggestion=f"accepted: {', '.join(SCALE_CODES)} (vLLM takes fp8)")
    if (checkpoint.quantization or {}).get("quant_method") != METHOD:
        raise _refusal("kv_cache_scheme is a part of compressed-tensors checkpoints, and this is none")
    if checkpoint.parts:
        raise _refusal("kv_cache_scheme needs the names of a model's own files, and this one is read under others")
    found = (ATTENTION.fullmatch(name) for name in checkpoint.tensors)
    names = {int(match["layer"]): match["name"] for match in found if match is not None}
    if not names:
        raise _refusal("kv_cache_scheme needs attention that is called self_attn, with k_proj or qkv_proj")
    return names


def _write_shard(
    checkpoint: Checkpoint, scales: Mapping[str, Tensor | TensorSource], metadata: Mapping[str, str]
) -> tuple[dict[str, str], set[str]]:
    """The sums of the files that are new, and the shards that nothing names any more; the index is written last."""
    directory, hashes = checkpoint.directory, {}
    kept = {name: stored for name, stored in checkpoint.tensors.items() if not CACHE_SCALE.fullmatch(name)}
    left = {stored.file for name, stored in checkpoint.tensors.items() if name not in kept} - {SCALES_FILE}
    homes = {file: file for file in checkpoint.files}
    for file in sorted(left):
        rest = {name: checkpoint.source(name) for name, stored in kept.items() if stored.file == file}
        while homes[file] in checkpoint.files:
            homes[file] = homes[file].removesuffix(".safetensors") + "-weights.safetensors"
        if rest:
            new = directory / homes[file]
            hashes[new.name] = write_file(new, serialize(rest, read_index(directory / file).metadata))
    hashes[SCALES_FILE] = write_file(directory / SCALES_FILE, serialize(scales, metadata))
    weight_map = {name: homes[stored.file] for name, stored in kept.items()} | dict.fromkeys(scales, SCALES_FILE)
    total = sum(stored.entry.nbytes for stored in kept.values()) + 4 * len(scales)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    hashes[INDEX] = write_file(directory / INDEX, _json(index))
    return hashes, left


def _renew_checksums(checkpoint: Checkpoint, hashes: Mapping[str, str], left: Set[str]) -> None:
    path = find_file(checkpoint.directory, CHECKSUMS)
    if path is not None and listed_files(checkpoint.directory):
        known = read_object(path, code="BW314", limit=LIMIT)["sha256"]
        listed = {file: digest for file, digest in (known | dict(hashes)).items() if file not in left}
        write_file(path, [serialize_checksums(listed)])


def read_scales(checkpoint: Checkpoint) -> dict[int, Ranges] | None:
    """The ranges that the scales in a checkpoint cover, by layer; ``None`` if it has none.

    Raises:
        BitwrightError: BW404 if they are of a kind that is not read, or were made for other weights; BW304, BW309 if a
            tensor is damaged.
    """
    record = checkpoint.quantization or {}
    scheme = record.get("kv_cache_scheme")
    if record.get("quant_method") != METHOD or scheme is None:
        return None
    greatest, identity = GREATEST[_kind(checkpoint, scheme)], weights_identity(checkpoint)
    ranges: dict[int, Ranges] = {}
    for layer, name in sorted(attention_names(checkpoint, "fp8").items()):
        own: Ranges = {}
        for side, field in FIELDS:
            if f"{name}.{field}" not in checkpoint.tensors:
                raise _unusable(checkpoint, f"there is a kv_cache_scheme, and no {name}.{field}")
            limit = _read_scale(checkpoint, f"{name}.{field}", identity) * greatest
            own[side] = Range(-limit, limit)
        ranges[layer] = own
    return ranges


def _kind(checkpoint: Checkpoint, scheme: Any) -> str:
    fields = scheme if isinstance(scheme, dict) else {}
    kind = {("float", 8): "fp8", ("int", 8): "int8"}.get((str(fields.get("type", "int")), fields.get("num_bits", 8)))
    is_plain = fields.get("symmetric", True) is True and not fields.get("dynamic", False)
    if kind is None or not is_plain or fields.get("strategy") not in ("tensor", "attn_head"):
        told = ", ".join(f"{name} {fields[name]}" for name in ("type", "num_bits", "strategy") if name in fields)
        raise _unusable(checkpoint, f"its kv_cache_scheme ({told or 'without fields'}) is of a kind that is not read")
    return kind


def _read_scale(checkpoint: Checkpoint, name: str, identity: str) -> Tensor:
    """One number a layer or a head, float32 ``[1]`` or ``[heads]``."""
    stored = checkpoint.stored(name)
    written_for = read_index(checkpoint.directory / stored.file).metadata.get(IDENTITY)
    if written_for not in (None, identity):
        raise _unusable(checkpoint, f"{name} was calibrated for other weights than those beside it")
    shape = stored.entry.shape
    wanted = shape if len(shape) <= 1 else (shape[0], *(1 for _ in shape[1:]))
    scale = read_checked(checkpoint, name, DTYPES, wanted, field="kv_cache_scheme").to(torch.float32).reshape(-1)
    if not scale.numel() or not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise _unusable(checkpoint, f"{name} is not a positive number")
    return scale


def _json(value: Any) -> list[bytes]:
    return [(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()]


def _refusal(what: str) -> ArgumentError:
    advice = "bitwright quantize MODEL --format compressed-tensors --output DIR, then bitwright calibrate DIR"
    return ArgumentError("BW201", what, suggestion=advice)


def _unusable(checkpoint: Checkpoint, what: str) -> BitwrightError:
    where = str(checkpoint.directory)
    suggestion = f"bitwright calibrate {where}, or a scheme that needs no calibration, such as int8"
    return BitwrightError("BW404", what, where=where, suggestion=suggestion)
