"""Reading GPTQ checkpoints, whoever wrote them: both versions, every width, reordered columns.

The group of each column is believed from ``NAME.g_idx``, whatever ``desc_act`` says. Zero points are decoded one by
one and wrap at ``2^bits``: adding one to whole words would carry from a code into the next.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.core import bitpack
from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme, QuantScheme
from bitwright.formats.checkpoint import CONFIG, Checkpoint
from bitwright.formats.gptq_settings import METHOD, LayerSettings, find_settings, read_settings, version_of
from bitwright.formats.records import LayerRecord
from bitwright.formats.safetensors_file import DTYPES
from bitwright.formats.stored import check_finite, check_group_index, check_names, read_checked

__all__ = ["SCALE_DTYPES", "decode", "layers"]

FIELD = "qweight and quantization_config"
REQUIRED, OPTIONAL = {"qweight", "qzeros", "scales"}, {"bias", "g_idx"}
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def layers(checkpoint: Checkpoint) -> dict[str, LayerRecord]:
    """The records of all quantized layers: those that have a ``qweight``.

    Raises:
        BitwrightError: BW303, BW304 or BW311 if configuration and tensors do not agree or are of an unknown kind.
    """
    settings = read_settings(checkpoint)
    names = [name.removesuffix(".qweight") for name in checkpoint.tensors if name.endswith(".qweight")]
    if not names:
        what = "quantization_config is of GPTQ, but no tensor of the checkpoint is quantized"
        where, suggestion = str(checkpoint.directory / CONFIG), "fetch the model again"
        raise BitwrightError("BW311", what, where=where, suggestion=suggestion)
    check_names(checkpoint, dict.fromkeys(names, REQUIRED), OPTIONAL)
    return {name: _record(checkpoint, name, find_settings(checkpoint, settings, name)) for name in names}


def _record(checkpoint: Checkpoint, name: str, settings: LayerSettings) -> LayerRecord:
    packed, scales = checkpoint.stored(f"{name}.qweight").entry, checkpoint.stored(f"{name}.scales").entry
    dtype = DTYPES.get(scales.dtype)
    bits = settings.bits
    is_matrix = packed.dtype == "I32" and len(packed.shape) == 2 and min(packed.shape) > 0
    if not is_matrix or packed.shape[0] * 32 % bits:
        what = f"{name}.qweight is {packed.dtype} {list(packed.shape)}; a matrix of int32 words of {bits} bits a code"
        raise _shape_error(checkpoint, what)
    if dtype not in SCALE_DTYPES:
        raise _shape_error(checkpoint, f"{name}.scales is {scales.dtype}; F16, BF16 or F32")
    shape = (packed.shape[1], packed.shape[0] * 32 // bits)
    groups = 1 if settings.group is None else -(-shape[1] // settings.group)
    if scales.shape != (groups, shape[0]):
        what = f"{name}.scales is {list(scales.shape)}; [{groups}, {shape[0]}]"
        raise _shape_error(checkpoint, what)
    weight = QuantScheme(
        code="int" if settings.symmetric else "uint",
        bits=bits,
        group=settings.group,
        symmetric=settings.symmetric,
        scale_dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float16,  # float32: see float16_scales
    )
    desc_act = (checkpoint.quantization or {}).get("desc_act") is True
    reordered = desc_act and settings.group is not None and f"{name}.g_idx" in checkpoint.tensors
    return LayerRecord(LayerScheme(weight=weight), shape, reordered)


def decode(checkpoint: Checkpoint, name: str, record: LayerRecord) -> QuantizedTensor:
    """Read one layer.

    Raises:
        BitwrightError: BW303 if a tensor is missing, BW304 if one has another dtype or shape than is called for,
            BW309 if a scale is not finite, BW311 if a column lies outside the groups, or the layer is called symmetric
            and has zero points of its own.
    """
    scheme, (rows, columns) = record.scheme.weight, record.shape
    groups = 1 if scheme.group is None else -(-columns // scheme.group)
    words = bitpack.packed_words(columns, scheme.bits)
    index = _read_group_index(checkpoint, name, record, groups)
    scales = read_checked(checkpoint, f"{name}.scales", SCALE_DTYPES, (groups, rows), field=FIELD)
    check_finite(f"{name}.scales", scales)
    zero = _read_zero(checkpoint, name, scheme, (rows, groups))
    packed = read_checked(checkpoint, f"{name}.qweight", (torch.int32,), (words, rows), field=FIELD)
    codes = bitpack.unpack(packed.t().contiguous(), scheme.bits, columns)
    if scheme.symmetric:
        codes = (codes - (1 << (scheme.bits - 1))).view(torch.int8)
    return QuantizedTensor(
        scheme=scheme,
        codes=codes,
        scale=scales.t().contiguous(),
        zero=None if scheme.symmetric else zero,
        group_index=index,
    )


def _read_zero(checkpoint: Checkpoint, name: str, scheme: QuantScheme, shape: tuple[int, int]) -> Tensor:
    """Zero points ``[out, groups]`` as codes, which version 1 stores less one."""
    (rows, groups), bits = shape, scheme.bits
    words = bitpack.packed_words(rows, bits)
    packed = read_checked(checkpoint, f"{name}.qzeros", (torch.int32,), (groups, words), field=FIELD)
    zero = bitpack.unpack(packed, bits, rows).t().contiguous()
    quantization, middle = checkpoint.quantization or {}, 1 << (bits - 1)
    # AutoRound has written either version under one name; symmetric layers tell by themselves which it is.
    is_first = scheme.symmetric and quantization.get("quant_method") != METHOD and bool((zero == middle - 1).all())
    if is_first or version_of(quantization) == 1:
        zero = (zero + 1) & ((1 << bits) - 1)
    if scheme.symmetric and not bool((zero == middle).all()):
        what = f"{name} has zero points other than {middle}, but the configuration calls it symmetric"
        where = str(checkpoint.directory / CONFIG)
        raise BitwrightError("BW311", what, where=where, suggestion='set "sym" to false, or fetch the model again')
    return zero


def _read_group_index(checkpoint: Checkpoint, name: str, record: LayerRecord, groups: int) -> Tensor | None:
    """The group of each column, unless groups are runs of columns."""
    tensor, columns, size = f"{name}.g_idx", record.shape[1], record.scheme.weight.group
    if tensor not in checkpoint.tensors:
        return None
    index = read_checked(checkpoint, tensor, (torch.int32,), (columns,), field=FIELD)
    check_group_index(tensor, index, groups)
    if size is None or torch.equal(index, torch.arange(columns, dtype=torch.int32) // size):
        return None
    largest = int(torch.bincount(index, minlength=groups).max())
    if largest > size:  # kernels make room for groups of one size
        what = f"{tensor} puts {largest} columns into one group, but group_size is {size}"
        raise BitwrightError("BW311", what, suggestion="the checkpoint is damaged: fetch it again")
    return index


def _shape_error(checkpoint: Checkpoint, what: str) -> BitwrightError:
    suggestion = "fetch the model again: config.json and the weights are not of one version"
    where, why = str(checkpoint.directory), "by quantization_config and the other tensors of the layer"
    return BitwrightError("BW304", f"{what} is called for", where=where, why=why, suggestion=suggestion)
