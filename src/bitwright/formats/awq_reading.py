"""Reading AWQ checkpoints in the layouts of AutoAWQ and llm-awq: ``gemm``, ``gemv`` and ``gemv_fast``.

``[N out, K in]``, ``G`` groups of columns, ``P`` the number of groups with the padding that the last two have:

- gemm: ``qweight`` int32 ``[K, N/8]``, ``qzeros`` int32 ``[G, N/8]``, ``scales`` ``[G, N]``; the eight codes of a word
  are those of eight output features in the order ``ORDER``.
- gemv: ``qweight`` int32 ``[N, K/8]``, ``qzeros`` int32 ``[N, P/8]``, ``scales`` ``[N, P]``, in plain order.
- gemv_fast: ``qweight`` int16 ``[N/4, K]``, four output features interleaved; ``scales`` ``[P, N]`` and, in the place
  of zero points, ``qzeros`` (llm-awq: ``scaled_zeros``) ``[P, N]`` float16, which is ``-zero * scale``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bitwright.core import bitpack
from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme, QuantScheme
from bitwright.formats.checkpoint import CONFIG, Checkpoint
from bitwright.formats.gptq_settings import is_auto_round
from bitwright.formats.records import LayerRecord
from bitwright.formats.safetensors_file import DTYPES
from bitwright.formats.stored import check_finite, check_names, read_checked

__all__ = ["AUTO_ROUND_PACKINGS", "BITS", "METHOD", "MIDDLE", "ORDER", "decode", "layers", "recognize"]

METHOD = "awq"
BITS = 4
MIDDLE = 8  # the zero point of symmetric layers
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of the eight codes of a word
LAYOUTS = {"gemm": "gemm", "exllama": "gemm", "exllamav2": "gemm", "ipex": "gemm", "gemv": "gemv"} | dict.fromkeys(
    ("gemv_fast", "gemvfast", "llm-awq"), "gemv_fast"
)
AUTO_ROUND_PACKINGS = {"auto_round:auto_awq": "gemm", "auto_round:awq": "gemm", "auto_awq": "gemm"}
FIELD = "qweight and quantization_config"
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERLEAVED_ROWS, STRIDE = 4, 64  # of gemv_fast


@dataclass(frozen=True, slots=True)
class _Settings:
    """The configuration, read; ``group``: columns per scale, ``None`` for one scale per output feature."""

    layout: str
    group: int | None
    symmetric: bool
    skipped: tuple[str, ...]


def recognize(quantization: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is of this format, whatever its layout."""
    return quantization.get("quant_method") == METHOD or is_auto_round(quantization, AUTO_ROUND_PACKINGS)


def _read_settings(checkpoint: Checkpoint) -> _Settings:
    quantization = checkpoint.quantization or {}
    named = str(quantization.get("version", quantization.get("format", "gemm")))[:40].lower()
    if quantization.get("quant_method") != METHOD:
        named = "gemm"  # AutoRound says "gemm" with the name of its packing
    elif str(quantization.get("backend")).lower() == "llm-awq":
        named = "llm-awq"
    if named not in LAYOUTS:
        raise _refusal(checkpoint, f"the layout {named!r} of AWQ is not one of {', '.join(LAYOUTS)}")
    bits = quantization.get("bits", quantization.get("w_bit", BITS))
    if bits != BITS or type(bits) is not int:
        raise _refusal(checkpoint, f"bits is {str(bits)[:40]}; AWQ checkpoints are read in {BITS} bits")
    size = quantization.get("group_size", quantization.get("q_group_size", -1))
    if type(size) is not int or size < -1 or size == 0 or size >= 1 << 31:
        raise _refusal(checkpoint, f"group_size is {str(size)[:40]}, not a size or -1")
    has_zero = quantization.get("zero_point", not quantization.get("sym", False))
    if type(has_zero) is not bool:
        raise _refusal(checkpoint, f"zero_point is {str(has_zero)[:40]}, not true or false")
    skipped = quantization.get("modules_to_not_convert") or []
    if not isinstance(skipped, list) or not all(isinstance(name, str) and name for name in skipped):
        raise _refusal(checkpoint, "modules_to_not_convert is not a list of names")
    return _Settings(LAYOUTS[named], None if size == -1 else size, not has_zero, tuple(skipped))


def layers(checkpoint: Checkpoint) -> dict[str, LayerRecord]:
    """The records of all quantized layers: those that have a ``qweight``.

    Raises:
        BitwrightError: BW303, BW304 or BW311 if configuration and tensors do not agree or are of an unknown kind.
    """
    settings = _read_settings(checkpoint)
    names = [name.removesuffix(".qweight") for name in checkpoint.tensors if name.endswith(".qweight")]
    if not names:
        raise _refusal(checkpoint, "quantization_config is of AWQ, but no tensor of the checkpoint is quantized")
    required = {name: {"qweight", "scales"} | ({_zeros(checkpoint, name)} - {""}) for name in names}
    if not settings.symmetric:
        required = {name: fields if len(fields) == 3 else fields | {"qzeros"} for name, fields in required.items()}
    check_names(checkpoint, required, {"bias"})
    return {name: _record(checkpoint, name, settings) for name in names}


def _zeros(checkpoint: Checkpoint, name: str) -> str:
    """What the zero points of a layer are called; the empty string if it has none."""
    return next((field for field in ("qzeros", "scaled_zeros") if f"{name}.{field}" in checkpoint.tensors), "")


def _record(checkpoint: Checkpoint, name: str, settings: _Settings) -> LayerRecord:
    # Some readers match any part of a name, others whole components: what both take for a match contradicts the file.
    matched = next((part for part in settings.skipped if f".{part}." in f".{name}."), None)
    if matched is not None:
        what = f"{name} is stored quantized, but {matched[:80]!r} in modules_to_not_convert says that it is not"
        raise _refusal(checkpoint, what)
    shape, groups = _shape(checkpoint, name, settings), 1
    if settings.group is not None:
        if shape[1] % settings.group:
            what = f"groups of {settings.group} do not divide the {shape[1]} input features of {name}"
            raise _shape_error(checkpoint, what, "they are called for by group_size in quantization_config")
        groups = shape[1] // settings.group
    scales = checkpoint.stored(f"{name}.scales").entry
    wanted = _scale_shape(settings.layout, shape, groups, settings.group)
    dtype = DTYPES.get(scales.dtype)
    if dtype not in SCALE_DTYPES or scales.shape != wanted:
        what = f"{name}.scales is {scales.dtype} {list(scales.shape)}; float16 {list(wanted)} is called for"
        raise _shape_error(checkpoint, what, f"by {FIELD}")
    weight = QuantScheme(
        code="int" if settings.symmetric else "uint",
        bits=BITS,
        group=settings.group,
        symmetric=settings.symmetric,
        scale_dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float16,  # float32: see float16_scales
    )
    return LayerRecord(LayerScheme(weight=weight), shape)


def _shape(checkpoint: Checkpoint, name: str, settings: _Settings) -> tuple[int, int]:
    """``(out, in)`` of a layer, from the shape of its ``qweight``."""
    entry = checkpoint.stored(f"{name}.qweight").entry
    wanted = "I16" if settings.layout == "gemv_fast" else "I32"
    if entry.dtype != wanted or len(entry.shape) != 2 or min(entry.shape) < 1:
        what = f"{name}.qweight is {entry.dtype} {list(entry.shape)}; a matrix of {wanted} is called for"
        raise _shape_error(checkpoint, what, f"by the layout {settings.layout} of AWQ")
    first, second = entry.shape
    if settings.layout == "gemm":
        return second * 8, first
    if settings.layout == "gemv":
        return first, second * 8
    if second % STRIDE:
        what = f"{name} has {second} input features, which is not a multiple of {STRIDE}"
        raise _shape_error(checkpoint, what, "the layout gemv_fast of AWQ calls for it")
    return first * INTERLEAVED_ROWS, second


def _scale_shape(layout: str, shape: tuple[int, int], groups: int, group: int | None) -> tuple[int, int]:
    if layout == "gemm":
        return groups, shape[0]
    padded = _padded_groups(groups, shape[1] if group is None else group)
    return (shape[0], padded) if layout == "gemv" else (padded, shape[0])


def _padded_groups(groups: int, size: int) -> int:
    """How many groups the two layouts for vectors make room for: whole words, and more for small groups."""
    words, multiple = -(-groups // 8), max(1, 128 // size) if size < 128 else 1
    return -(-words // multiple) * multiple * 8


def decode(checkpoint: Checkpoint, name: str, record: LayerRecord) -> QuantizedTensor:
    """Read one layer.

    Raises:
        BitwrightError: BW303 if a tensor is missing, BW304 if one has another dtype or shape than is called for,
            BW309 if a scale is not finite, BW311 if zero points are not what the configuration says.
    """
    settings, shape, scheme = _read_settings(checkpoint), record.shape, record.scheme.weight
    groups = 1 if scheme.group is None else shape[1] // scheme.group
    stored = read_checked(
        checkpoint,
        f"{name}.scales",
        SCALE_DTYPES,
        _scale_shape(settings.layout, shape, groups, scheme.group),
        field=FIELD,
    )
    scale = (stored if settings.layout == "gemv" else stored.t())[:, :groups].contiguous()
    check_finite(f"{name}.scales", scale)
    zero = _read_zero(checkpoint, name, settings.layout, shape, scale, scheme)
    if zero is not None and scheme.symmetric:
        if not bool((zero == MIDDLE).all()):
            raise _refusal(checkpoint, f"{name} has zero points other than {MIDDLE}, but zero_point is false")
        zero = None
    codes = _read_codes(checkpoint, name, settings.layout, shape)
    if scheme.symmetric:
        codes = (codes - MIDDLE).view(torch.int8)
    return QuantizedTensor(scheme=scheme, codes=codes, scale=scale, zero=zero)


def _read_codes(checkpoint: Checkpoint, name: str, layout: str, shape: tuple[int, int]) -> Tensor:
    """Codes ``[out, in]`` as uint8."""
    (rows, columns), tensor = shape, f"{name}.qweight"
    if layout == "gemm":
        packed = read_checked(checkpoint, tensor, (torch.int32,), (columns, rows // 8), field=FIELD)
        return _in_order(bitpack.unpack(packed, BITS, rows)).t().contiguous()
    if layout == "gemv":
        packed = read_checked(checkpoint, tensor, (torch.int32,), (rows, columns // 8), field=FIELD)
        return bitpack.unpack(packed, BITS, columns)
    quarter = rows // INTERLEAVED_ROWS
    packed = read_checked(checkpoint, tensor, (torch.int16,), (quarter, columns), field=FIELD)
    codes = bitpack.unpack(packed.view(torch.int32), BITS, columns * INTERLEAVED_ROWS)
    # Runs of 64 columns of four rows lie one after another. Their columns come in runs of 32: a pair from each
    # quarter, four times; and of the eight of each time, the even ones first.
    strided = codes.view(quarter, columns // STRIDE, INTERLEAVED_ROWS, STRIDE).transpose(1, 2)
    eights = strided.reshape(rows, columns // 32, 4, 2, 4).transpose(3, 4)
    pairs = eights.reshape(rows, columns // 32, 4, 4, 2).transpose(2, 3)
    return pairs.reshape(rows, columns)


def _in_order(codes: Tensor) -> Tensor:
    """Undo the order of the eight codes of each word."""
    inverse = [ORDER.index(position) for position in range(8)]
    return codes.view(codes.shape[0], -1, 8)[:, :, inverse].flatten(1)


def _read_zero(
    checkpoint: Checkpoint, name: str, layout: str, shape: tuple[int, int], scale: Tensor, scheme: QuantScheme
) -> Tensor | None:
    """Zero points ``[out, groups]`` as uint8; ``None`` if there are none, as symmetric layers may have it."""
    field, (rows, groups) = _zeros(checkpoint, name), scale.shape
    if not field:
        return None
    tensor, padded = f"{name}.{field}", _padded_groups(groups, scheme.group or shape[1])
    if layout == "gemm":
        packed = read_checked(checkpoint, tensor, (torch.int32,), (groups, rows // 8), field=FIELD)
        return _in_order(bitpack.unpack(packed, BITS, rows)).t().contiguous()
    if layout == "gemv":
        packed = read_checked(checkpoint, tensor, (torch.int32,), (rows, padded // 8), field=FIELD)
        return bitpack.unpack(packed, BITS, padded)[:, :groups].contiguous()
    scaled = read_checked(checkpoint, tensor, SCALE_DTYPES, (padded, rows), field=FIELD).t()[:, :groups]
    check_finite(tensor, scaled)
    # Rounded to float16, -zero * scale is still nearest to the same whole multiple. Where the scale is 0, any will do.
    zero = (-scaled.to(torch.float32) / scale.to(torch.float32)).nan_to_num(0.0, 0.0, 0.0)
    rounded = zero.round()
    if not bool(((zero - rounded).abs() < 0.25).all()) or not bool(((rounded >= 0) & (rounded < 16)).all()):
        raise _refusal(checkpoint, f"{tensor} is not of whole zero points of {BITS} bits")
    return rounded.to(torch.uint8).contiguous()


def _shape_error(checkpoint: Checkpoint, what: str, why: str) -> BitwrightError:
    suggestion = "fetch the model again: config.json and the weights are not of one version"
    return BitwrightError("BW304", what, where=str(checkpoint.directory), why=why, suggestion=suggestion)


def _refusal(checkpoint: Checkpoint, what: str) -> BitwrightError:
    suggestion = "bitwright reads AWQ checkpoints of 4 bits in the layouts gemm, gemv and gemv_fast"
    return BitwrightError("BW311", what, where=str(checkpoint.directory / CONFIG), suggestion=suggestion)
