"""The compressed-tensors format, which vLLM, SGLang and transformers load: ``pack-quantized`` and ``int-quantized``.

Codes are signed there; what is packed is the code plus ``2^(b-1)``, that is, the code counted from the smallest one.
Weight-only layers are packed: ``NAME.weight_packed`` int32 along the input features, ``NAME.weight_scale`` (``[out,
groups]``), ``NAME.weight_shape`` int64 ``[2]`` and, where asymmetric, ``NAME.weight_zero_point`` int32, packed along
the *output* features. Layers with 8-bit activations hold one int8 a code in ``NAME.weight``, as the package's own
writer does, whatever the number of bits.

Scales keep the dtype that they have. A negative scale (``full`` symmetric ranges) is stored as it is: decoding is
``code * scale`` everywhere, so its sign needs no support.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitwright.core import bitpack
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import DYNAMIC_FP8, LayerScheme
from bitwright.formats import compressed_tensors_reading as reading
from bitwright.formats.records import Format, LayerRecord, plain_scale

__all__ = ["FORMAT", "config", "encode", "refuse", "refuse_together"]

# The first version of the package that packs odd widths densely, as we do.
LAYOUT_VERSION = "0.18.0"
PACKED, BYTES, MIXED = "pack-quantized", "int-quantized", "mixed-precision"


def refuse(scheme: LayerScheme, shape: tuple[int, int]) -> str | None:
    """Why this format cannot store a layer ``shape`` (``[out, in]``), or ``None`` if it can."""
    weight = scheme.weight
    columns = shape[1]
    if scheme.activation == DYNAMIC_FP8:
        return "it has no fp8 activations for weights of this kind"
    if weight.is_codebook:
        return f"it has no {weight.code} codes for weights of this kind"
    if weight.scale_scheme is not None:
        return "it has no double quantization"
    if weight.zero == "float":
        return "its zero points are whole numbers, not floats"
    if weight.axis != 1:
        return "its groups run along the input features alone"
    if weight.bits == 1:
        return "its readers expect at least 2 bits"
    for group in (weight.group, scheme.activation_group):
        if group is not None and columns % group:
            divisors = [size for size in (256, 128, 64, 32, 16) if columns % size == 0]
            fitting = f" (these do: {', '.join(map(str, divisors))})" if divisors else ""
            return f"its groups have one size, and groups of {group} do not divide {columns} input features{fitting}"
    return None


def encode(name: str, tensor: QuantizedTensor, scheme: LayerScheme) -> dict[str, Tensor]:
    """The tensors of the layer ``name`` by their names in the file.

    Raises:
        BitwrightError: BW205 if the format cannot store the layer.
    """
    scale = plain_scale(name, tensor, scheme, title="compressed-tensors", reason=refuse(scheme, tensor.shape))
    bits = scheme.weight.bits
    if scheme.activation is not None:
        tensors = {f"{name}.weight": _signed(tensor.codes, bits), f"{name}.weight_scale": scale}
        if tensor.zero is not None:
            tensors[f"{name}.weight_zero_point"] = _signed(tensor.zero, bits)
        return tensors
    tensors = {
        f"{name}.weight_packed": _pack(tensor.codes, bits),
        f"{name}.weight_scale": scale,
        f"{name}.weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
    }
    if tensor.zero is not None:
        packed = _pack(tensor.zero.t().contiguous(), bits)
        tensors[f"{name}.weight_zero_point"] = packed.t().contiguous()
    return tensors


def _pack(codes: Tensor, bits: int) -> Tensor:
    """Packed along the last dimension, counted from the smallest code; those of ``uint`` schemes are so already."""
    return bitpack.pack(codes.view(torch.uint8), bits, offset=0 if codes.dtype == torch.uint8 else 1 << (bits - 1))


def _signed(codes: Tensor, bits: int) -> Tensor:
    """Codes as int8, those of ``uint`` schemes moved down by ``2^(b-1)``."""
    return codes if codes.dtype == torch.int8 else (codes - (1 << (bits - 1))).view(torch.int8)


def config(layers: Mapping[str, LayerRecord], ignored: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint with these layers.

    All layers of one kind are the target ``Linear``; else every layer is named.
    """
    names: dict[LayerScheme, list[str]] = {}
    groups: list[tuple[dict[str, Any], list[str]]] = []
    for name, record in layers.items():
        names.setdefault(record.scheme, []).append(name)
    for scheme, targets in names.items():
        group = _config_group(scheme)
        same = next((found for found in groups if found[0] == group), None)
        if same is None:
            groups.append((group, targets))
        else:
            same[1].extend(targets)
    formats = {group["format"] for group, _ in groups}
    packed_zeros = any(group["format"] == PACKED and not group["weights"]["symmetric"] for group, _ in groups)
    return {
        "quant_method": reading.METHOD,
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "version": LAYOUT_VERSION,
        "config_groups": {
            f"group_{number}": {"targets": ["Linear"] if len(groups) == 1 else targets, **group}
            for number, (group, targets) in enumerate(groups)
        },
        "ignore": list(ignored),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        # Version 0.20 of the package makes no room for packed zero points where weights stay packed. Told to decode
        # while it loads, transformers reads such checkpoints too; others do not look at this.
        **({"dequantize": True} if packed_zeros else {}),
    }


def _config_group(scheme: LayerScheme) -> dict[str, Any]:
    weight = scheme.weight
    weights: dict[str, Any] = {
        "num_bits": weight.bits,
        "type": "int",
        "symmetric": weight.symmetric,
        "strategy": "channel" if weight.group is None else "group",
        "group_size": weight.group,
        "dynamic": False,
    }
    activations: dict[str, Any] | None = None
    if scheme.activation is not None:
        activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
        if scheme.activation_group is not None:
            activations |= {"strategy": "group", "group_size": scheme.activation_group}
    return {
        "weights": weights,
        "input_activations": activations,
        "output_activations": None,
        "format": PACKED if scheme.activation is None else BYTES,
    }


def refuse_together(records: Mapping[str, LayerRecord], ignored: Sequence[str]) -> str | None:
    """Why these layers cannot be stored: readers of today take the columns of a group to be consecutive."""
    reordered = next((name for name, record in records.items() if record.reordered), None)
    return None if reordered is None else f"the groups of {reordered} are not runs of consecutive columns"


FORMAT = Format(
    name=reading.METHOD,
    refuse=refuse,
    encode=encode,
    config=config,
    recognize=reading.recognize,
    layers=reading.layers,
    decode=reading.decode,
    refuse_together=refuse_together,
)
