"""Reading compressed-tensors checkpoints, those of other writers too.

The format's name does not tell how codes of 3, 5, 6 and 7 bits are packed: older writers leave the rest of each word
empty once no whole code fits, newer ones pack densely. The widths of the packed tensors tell the two apart; where both
come to the same width, the version in the configuration decides, and without one the bits that the older way leaves
empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitwright.core import bitpack
from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme, QuantScheme
from bitwright.formats.checkpoint import CONFIG, Checkpoint
from bitwright.formats.compressed_tensors_groups import ConfigGroup, find_group, read_groups
from bitwright.formats.records import LayerRecord
from bitwright.formats.safetensors_file import DTYPES
from bitwright.formats.stored import check_finite, check_group_index, check_names, read_checked

__all__ = ["METHOD", "decode", "layers", "recognize"]

METHOD = "compressed-tensors"
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FIRST_DENSE_VERSION = (0, 18)
FIELD = "weights in config_groups of quantization_config"


@dataclass(frozen=True, slots=True)
class _Layer:
    """The tensors of one layer, before they are read."""

    name: str
    is_packed: bool
    shape: tuple[int, int]
    group: ConfigGroup


def recognize(quantization: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is of this format, whatever its version."""
    return quantization.get("quant_method") == METHOD


def layers(checkpoint: Checkpoint) -> dict[str, LayerRecord]:
    """The records of all quantized layers.

    Raises:
        BitwrightError: BW303, BW304 or BW311 if configuration and tensors do not agree or are of an unknown kind.
    """
    groups = read_groups(checkpoint)
    found: dict[str, LayerRecord] = {}
    for tensor, stored in checkpoint.tensors.items():
        name, _, field = tensor.rpartition(".")
        if field == "weight_packed":
            found[name] = _record(checkpoint, _packed_layer(checkpoint, name, find_group(checkpoint, groups, name)))
        elif field == "weight" and f"{name}.weight_scale" in checkpoint.tensors:
            group = find_group(checkpoint, groups, name)
            if stored.entry.dtype != ("F8_E4M3" if group.is_float else "I8") or len(stored.entry.shape) != 2:
                raise _record_error(checkpoint, f"{tensor} is {stored.entry.dtype}, which is not read in this format")
            found[name] = _record(checkpoint, _Layer(name, False, _pair(stored.entry.shape), group))
    if not found:
        raise _record_error(checkpoint, "no tensor of the checkpoint is quantized")
    required = {name: _tensor_names(checkpoint, name, record.scheme.weight) for name, record in found.items()}
    check_names(checkpoint, required, {"bias", "weight_g_idx", "weight_zero_point"})
    return found


def _tensor_names(checkpoint: Checkpoint, name: str, scheme: QuantScheme) -> set[str]:
    """The tensors that a layer must have, without its own name. (Some writers store zero points that are all zero.)"""
    is_packed = f"{name}.weight_packed" in checkpoint.tensors
    names = {"weight_packed", "weight_scale", "weight_shape"} if is_packed else {"weight", "weight_scale"}
    return names if scheme.symmetric else names | {"weight_zero_point"}


def _packed_layer(checkpoint: Checkpoint, name: str, group: ConfigGroup) -> _Layer:
    if group.is_float:
        raise _record_error(checkpoint, f"{name}.weight_packed is of floats, which are read one a byte")
    shape = read_checked(checkpoint, f"{name}.weight_shape", (torch.int64, torch.int32), (2,), field="the format")
    rows, columns = (int(size) for size in shape)
    packed = checkpoint.stored(f"{name}.weight_packed").entry.shape
    if len(packed) != 2 or packed[0] != rows or not 0 < columns <= packed[1] * 32:
        what = f"{name}.weight_shape is [{rows}, {columns}], but weight_packed is {list(packed)}"
        raise _shape_error(checkpoint, what, "both are the shape of one layer")
    return _Layer(name, True, (rows, columns), group)


def _record(checkpoint: Checkpoint, layer: _Layer) -> LayerRecord:
    group, columns = layer.group, layer.shape[1]
    for size in (group.size, None if group.activation is None else group.activation.group):
        if size is not None and columns % size:
            what = f"groups of {size} do not divide the {columns} input features of {layer.name}"
            raise _shape_error(checkpoint, what, f"they are called for by {FIELD}")
    entry = checkpoint.stored(f"{layer.name}.weight_scale").entry
    dtype = DTYPES.get(entry.dtype)
    if dtype not in SCALE_DTYPES:
        what = f"{layer.name}.weight_scale is {entry.dtype}; F16, BF16 or F32 is called for"
        raise _shape_error(checkpoint, what, "by the format")
    weight = QuantScheme(
        code="fp8_e4m3" if group.is_float else "int" if group.symmetric else "uint",
        bits=group.bits,
        group=group.size,
        symmetric=group.symmetric,
        scale_dtype=dtype,
    )
    try:
        record = LayerRecord(LayerScheme(weight=weight, activation=group.activation), layer.shape)
        if record.scheme.activation_group is not None:
            record.scheme.check_order(reordered=_read_group_index(checkpoint, layer.name, record) is not None)
    except ArgumentError as error:
        raise _record_error(checkpoint, f"the numbers of {layer.name} are not read: {error.what}") from error
    return record


def decode(checkpoint: Checkpoint, name: str, record: LayerRecord) -> QuantizedTensor:
    """Read one layer. Zero points and asymmetric codes come as ``uint``, whatever the writer called them.

    Raises:
        BitwrightError: BW303 if a tensor is missing, BW304 if one has another dtype or shape than is called for,
            BW309 if a scale is not finite, BW311 if a code or group lies outside its range.
    """
    scheme, (rows, columns) = record.scheme.weight, record.shape
    is_packed = f"{name}.weight_packed" in checkpoint.tensors
    index = _read_group_index(checkpoint, name, record)
    groups = 1 if scheme.group is None else columns // scheme.group
    if is_packed:
        padded = scheme.bits in (3, 5, 6, 7) and _is_padded(checkpoint, name, record, groups)
        words = _words(columns, scheme.bits, padded)
        packed = read_checked(checkpoint, f"{name}.weight_packed", (torch.int32,), (rows, words), field=FIELD)
        unsigned = _unpack(packed, scheme.bits, columns, padded)
        zero = None if scheme.symmetric else _read_packed_zero(checkpoint, name, scheme, (rows, groups), padded)
    elif scheme.code == "fp8_e4m3":
        unsigned, zero = _read_floats(checkpoint, f"{name}.weight", (rows, columns)), None
    else:
        unsigned = _read_bytes(checkpoint, f"{name}.weight", scheme, (rows, columns))
        zero = None
        if not scheme.symmetric:
            zero = _read_bytes(checkpoint, f"{name}.weight_zero_point", scheme, (rows, groups))
    scale = _read_spread(checkpoint, f"{name}.weight_scale", SCALE_DTYPES, (rows, groups))
    check_finite(f"{name}.weight_scale", scale)
    codes = unsigned if scheme.code_dtype == torch.uint8 else (unsigned - (1 << (scheme.bits - 1))).view(torch.int8)
    return QuantizedTensor(scheme=scheme, codes=codes, scale=scale, zero=zero, group_index=index)


def _words(length: int, bits: int, padded: bool) -> int:
    return -(-length // (32 // bits)) if padded else bitpack.packed_words(length, bits)


def _unpack(words: Tensor, bits: int, length: int, padded: bool) -> Tensor:
    return bitpack.unpack_padded(words, bits, length) if padded else bitpack.unpack(words, bits, length)


def _is_padded(checkpoint: Checkpoint, name: str, record: LayerRecord, groups: int) -> bool:
    """Which way the odd widths of a layer are packed: by the widths of its tensors, the version, the empty bits."""
    bits, (rows, columns) = record.scheme.weight.bits, record.shape
    widths = [(checkpoint.stored(f"{name}.weight_packed").entry.shape[-1], columns)]
    zero = checkpoint.tensors.get(f"{name}.weight_zero_point")
    if zero is not None and zero.entry.dtype == "I32" and not record.scheme.weight.symmetric:
        widths.append((zero.entry.shape[0] if zero.entry.shape else 0, rows))
    for words, length in widths:
        dense, padded = _words(length, bits, False), _words(length, bits, True)
        if dense != padded:
            return words == padded
    version = _version(checkpoint)
    if version is not None:
        return version < FIRST_DENSE_VERSION
    packed = read_checked(checkpoint, f"{name}.weight_packed", (torch.int32,), (rows, widths[0][0]), field=FIELD)
    used = 32 // bits * bits
    return not bool((packed >> used).any())


def _version(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """Major and minor version of the package that wrote the checkpoint, if it says so."""
    parts = str((checkpoint.quantization or {}).get("version", ""))[:40].split(".")
    if len(parts) < 2 or not (parts[0].isdecimal() and parts[1].isdecimal()):
        return None
    return int(parts[0]), int(parts[1])


def _read_packed_zero(
    checkpoint: Checkpoint, name: str, scheme: QuantScheme, shape: tuple[int, int], padded: bool
) -> Tensor:
    """Zero points ``[out, groups]``, packed along the output features (or, by the oldest writers, as int8)."""
    tensor = f"{name}.weight_zero_point"
    if checkpoint.stored(tensor).entry.dtype == "I8":
        return _read_bytes(checkpoint, tensor, scheme, shape)
    rows, groups = shape
    words = _words(rows, scheme.bits, padded)
    packed = read_checked(checkpoint, tensor, (torch.int32,), (words, groups), field=FIELD)
    return _unpack(packed.t().contiguous(), scheme.bits, rows, padded).t().contiguous()


def _read_bytes(checkpoint: Checkpoint, name: str, scheme: QuantScheme, shape: tuple[int, int]) -> Tensor:
    """Signed codes, one int8 each, counted from the smallest one."""
    signed = _read_spread(checkpoint, name, (torch.int8,), shape)
    half = 1 << (scheme.bits - 1)
    if scheme.bits < 8 and signed.numel() and not -half <= int(signed.min()) <= int(signed.max()) < half:
        what = f"{name} holds codes outside {scheme.bits} bits"
        raise BitwrightError("BW311", what, suggestion="the checkpoint is damaged: fetch it again")
    return signed.view(torch.uint8) + half


def _read_floats(checkpoint: Checkpoint, name: str, shape: tuple[int, int]) -> Tensor:
    """e4m3 numbers as their bytes, which are the codes of that scheme."""
    codes = read_checked(checkpoint, name, (torch.float8_e4m3fn,), shape, field=FIELD).view(torch.uint8)
    if bool(((codes & 0x7F) == 0x7F).any()):
        what = f"{name} holds values that are NaN"
        raise BitwrightError("BW309", what, suggestion="the checkpoint is damaged: fetch it again")
    return codes


def _read_spread(checkpoint: Checkpoint, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, int]) -> Tensor:
    """A tensor with one value per group, or one for all, or one per row without a second dimension."""
    stored = checkpoint.stored(name).entry.shape
    if stored == shape or shape[1] != 1 or stored not in ((), (1,), (1, 1), shape[:1]):
        return read_checked(checkpoint, name, dtypes, shape, field=FIELD)
    return read_checked(checkpoint, name, dtypes, stored).reshape(-1, 1).expand(shape).contiguous()


def _read_group_index(checkpoint: Checkpoint, name: str, record: LayerRecord) -> Tensor | None:
    """The group of each column, which older writers store for reordered columns; all -1 means that there is none."""
    tensor, scheme = f"{name}.weight_g_idx", record.scheme.weight
    if tensor not in checkpoint.tensors or scheme.group is None:
        return None
    index = read_checked(checkpoint, tensor, (torch.int32,), (record.shape[1],), field="the format")
    if bool((index == -1).all()):
        return None
    check_group_index(tensor, index, record.shape[1] // scheme.group)
    return index


def _pair(shape: tuple[int, ...]) -> tuple[int, int]:
    return shape[0], shape[1]


def _shape_error(checkpoint: Checkpoint, what: str, why: str) -> BitwrightError:
    suggestion = "fetch the model again: config.json and the weights are not of one version"
    return BitwrightError("BW304", what, where=str(checkpoint.directory), why=why, suggestion=suggestion)


def _record_error(checkpoint: Checkpoint, what: str) -> BitwrightError:
    suggestion = "bitwright reads pack-quantized, int-quantized and (8 bits) float-quantized checkpoints"
    return BitwrightError("BW311", what, where=str(checkpoint.directory / CONFIG), suggestion=suggestion)
