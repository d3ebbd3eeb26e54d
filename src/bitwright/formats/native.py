"""The native format: every scheme, exactly as it is, with the record of each layer by its full name.

``quantization_config`` is ``{"quant_method": "bitwright", "version": 1, "layers": {NAME: {"scheme", "shape"}},
"ignored": [NAME]}``. The tensors of a layer are ``NAME.codes`` (int32 words, each row packed on its own; what is packed
is the code less the smallest one), ``NAME.scale`` in the dtype that the scales have, ``NAME.zero`` (integer zero points
packed in one stream over all groups, float ones as they are) and, where groups are not runs of columns,
``NAME.group_index``. Doubly quantized scales are such a layer again, under ``NAME.scale``. Beside them may be
``NAME.input_scale`` (float32 ``[in]``), by which the input of the layer is multiplied at run time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitwright.core import bitpack
from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme, QuantScheme
from bitwright.core.scheme_names import parse
from bitwright.formats.checkpoint import CONFIG, Checkpoint
from bitwright.formats.records import Format, LayerRecord
from bitwright.formats.stored import check_finite, check_group_index, check_names, read_checked

__all__ = ["FORMAT", "VERSION", "config", "decode", "encode", "layers", "recognize", "refuse"]

METHOD = "bitwright"
VERSION = 1


def refuse(scheme: LayerScheme, shape: tuple[int, int]) -> str | None:
    """Why a layer cannot be stored: never, since every scheme has a name that is read back to it."""
    return None


def encode(name: str, tensor: QuantizedTensor, scheme: LayerScheme) -> dict[str, Tensor]:
    """The tensors of the layer ``name`` by their names in the file.

    Raises:
        BitwrightError: BW205 if ``scheme`` is not that of ``tensor``.
    """
    if tensor.scheme != scheme.weight:
        what = f"the numbers of {name} are {tensor.scheme.name}, not {scheme.weight.name}"
        raise BitwrightError("BW205", what, suggestion="encode it with the scheme that it was quantized in")
    return _encode(name, tensor)


def _encode(name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
    scheme = tensor.scheme
    tensors = {f"{name}.codes": bitpack.pack(_unsigned(tensor.codes, scheme), scheme.bits)}
    if isinstance(tensor.scale, Tensor):
        tensors[f"{name}.scale"] = tensor.scale
    else:
        tensors |= _encode(f"{name}.scale", tensor.scale)
    if tensor.zero is not None:
        is_integer = scheme.zero == "integer"
        packed = bitpack.pack(_unsigned(tensor.zero, scheme).reshape(-1), scheme.bits) if is_integer else tensor.zero
        tensors[f"{name}.zero"] = packed
    if tensor.group_index is not None:
        tensors[f"{name}.group_index"] = tensor.group_index
    return tensors


def _unsigned(codes: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes counted from the smallest one, as uint8."""
    return codes if codes.dtype == torch.uint8 else (codes.view(torch.uint8) - (scheme.code_min & 0xFF))


def _signed(codes: Tensor, scheme: QuantScheme) -> Tensor:
    """The inverse of :func:`_unsigned`."""
    return codes if scheme.code_dtype == torch.uint8 else (codes + (scheme.code_min & 0xFF)).view(torch.int8)


def config(layers: Mapping[str, LayerRecord], ignored: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint with these layers."""
    records = {name: {"scheme": record.scheme.name, "shape": list(record.shape)} for name, record in layers.items()}
    return {"quant_method": METHOD, "version": VERSION, "layers": records, "ignored": list(ignored)}


def recognize(quantization: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is of this format, whatever its version."""
    return quantization.get("quant_method") == METHOD


def layers(checkpoint: Checkpoint) -> dict[str, LayerRecord]:
    """The records of all quantized layers.

    Raises:
        BitwrightError: BW311 for an unknown version or an unreadable record, BW303 if a layer lacks a tensor or has
            one too many.
    """
    quantization = checkpoint.quantization or {}
    version = quantization.get("version")
    if type(version) is not int or version != VERSION:
        raise _record_error(
            checkpoint,
            f"the checkpoint is of version {str(version)[:40]} of the native format",
            why=f"this bitwright reads version {VERSION}",
            suggestion="use the version of bitwright that wrote it, or a newer one",
        )
    records = quantization.get("layers")
    if not isinstance(records, dict) or not records:
        raise _record_error(checkpoint, "quantization_config has no records of layers")
    found = {name: _read_record(checkpoint, name, record) for name, record in records.items()}
    required = {name: _tensor_names(record.scheme.weight) for name, record in found.items()}
    check_names(checkpoint, required, {"bias", "group_index", "input_scale"})
    return found


def _tensor_names(scheme: QuantScheme) -> set[str]:
    """The tensors that a layer must have, without its own name."""
    names = {"codes"} if scheme.symmetric else {"codes", "zero"}
    if scheme.scale_scheme is None:
        return names | {"scale"}
    return names | {f"scale.{name}" for name in _tensor_names(scheme.scale_scheme)}


def _read_record(checkpoint: Checkpoint, name: str, record: object) -> LayerRecord:
    if not isinstance(record, dict) or set(record) != {"scheme", "shape"}:
        raise _record_error(checkpoint, f"the record of {name} is not a scheme and a shape")
    shape, text = record["shape"], record["scheme"]
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int for size in shape)
    if not is_shape or not 0 < min(shape) <= max(shape) < 1 << 31 or not isinstance(text, str) or len(text) > 100:
        raise _record_error(checkpoint, f"the record of {name} is not a scheme and a shape")
    try:
        scheme = parse(text)
        scheme.check_order(reordered=f"{name}.group_index" in checkpoint.tensors)
    except (BitwrightError, ValueError) as error:
        raise _record_error(checkpoint, f"the scheme of {name} cannot be read: {text!r}") from error
    return LayerRecord(scheme, (shape[0], shape[1]))


def decode(checkpoint: Checkpoint, name: str, record: LayerRecord) -> QuantizedTensor:
    """Read one layer.

    Raises:
        BitwrightError: BW303 if a tensor is missing, BW304 if one has another dtype or shape than the record calls for,
            BW309 if a scale is not finite, BW311 if the group index points outside the groups.
    """
    return _decode(checkpoint, name, record.scheme.weight, record.shape)


def _decode(checkpoint: Checkpoint, name: str, scheme: QuantScheme, shape: tuple[int, int]) -> QuantizedTensor:
    words = bitpack.packed_words(shape[1], scheme.bits)
    packed = read_checked(checkpoint, f"{name}.codes", (torch.int32,), (shape[0], words))
    codes = _signed(bitpack.unpack(packed, scheme.bits, shape[1]), scheme)
    size, other = shape[scheme.axis], shape[1 - scheme.axis]
    groups = 1 if scheme.group is None else -(-size // scheme.group)
    expected = (other, groups) if scheme.axis == 1 else (groups, other)
    scale: Tensor | QuantizedTensor
    if scheme.scale_scheme is not None:
        scale = _decode(checkpoint, f"{name}.scale", scheme.scale_scheme, (1, groups * other))
    else:
        scale = read_checked(checkpoint, f"{name}.scale", _allowed(scheme), expected)
        check_finite(f"{name}.scale", scale)
    index: Tensor | None = None
    if f"{name}.group_index" in checkpoint.tensors:
        index = read_checked(checkpoint, f"{name}.group_index", (torch.int32,), (shape[1],))
        check_group_index(f"{name}.group_index", index, groups)
    zero = _decode_zero(checkpoint, name, scheme, expected)
    return QuantizedTensor(scheme=scheme, codes=codes, scale=scale, zero=zero, group_index=index)


def _decode_zero(checkpoint: Checkpoint, name: str, scheme: QuantScheme, expected: tuple[int, int]) -> Tensor | None:
    if scheme.symmetric:
        return None
    if scheme.zero == "float":
        zero = read_checked(checkpoint, f"{name}.zero", _allowed(scheme), expected)
        check_finite(f"{name}.zero", zero)
        return zero
    count = expected[0] * expected[1]
    words = bitpack.packed_words(count, scheme.bits)
    packed = read_checked(checkpoint, f"{name}.zero", (torch.int32,), (words,))
    return _signed(bitpack.unpack(packed, scheme.bits, count), scheme).view(expected)


def _allowed(scheme: QuantScheme) -> tuple[torch.dtype, ...]:
    """The scheme's scale dtype, or float32 where that would under- or overflow."""
    return (scheme.scale_dtype,) if scheme.scale_dtype == torch.float32 else (scheme.scale_dtype, torch.float32)


def _record_error(checkpoint: Checkpoint, what: str, *, why: str = "", suggestion: str = "") -> BitwrightError:
    where = str(checkpoint.directory / CONFIG)
    return BitwrightError("BW311", what, where=where, why=why, suggestion=suggestion or "fetch config.json again")


FORMAT = Format(
    name="native", refuse=refuse, encode=encode, config=config, recognize=recognize, layers=layers, decode=decode
)
