"""The AWQ format of AutoAWQ in its ``gemm`` layout, which vLLM, SGLang and transformers load.

Tensors of a layer ``[N out, K in]`` with ``G`` groups of columns: ``NAME.qweight`` int32 ``[K, N/8]``, the codes of
eight output features to a word in the order 0, 2, 4, 6, 1, 3, 5, 7; ``NAME.qzeros`` int32 ``[G, N/8]`` in the same
order; ``NAME.scales`` float16 ``[G, N]``. Codes and zero points count from 0; symmetric layers have zero points of 8.
There are 4 bits and no other setting than one for the whole checkpoint. The two layouts made for single vectors are
read (see :mod:`bitwright.formats.awq_reading`), not written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from bitwright.core import bitpack
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme
from bitwright.formats import awq_reading as reading
from bitwright.formats.records import Format, LayerRecord, plain_scale
from bitwright.formats.stored import float16_scales, unsigned_codes

__all__ = ["FORMAT", "config", "encode", "refuse", "refuse_together"]

GROUPS = (16, 32, 64, 128)  # that its readers know
HEADS = ("lm_head", "embed_out")


def refuse(scheme: LayerScheme, shape: tuple[int, int]) -> str | None:
    """Why this format cannot store a layer ``shape`` (``[out, in]``), or its readers not load it; else ``None``."""
    reason, group = _obstacle(scheme, shape), scheme.weight.group
    if reason is None and scheme.weight.scale_dtype != torch.float16:
        return "its scales are float16"
    if reason is None and group is not None and group not in GROUPS and group != shape[1]:
        return f"its readers know groups of {', '.join(map(str, GROUPS))}, not {group}"
    return reason


def _obstacle(scheme: LayerScheme, shape: tuple[int, int]) -> str | None:
    """What in a layer the tensors of this format cannot hold."""
    weight = scheme.weight
    reasons = {
        f"it has no {weight.code} codes": weight.is_codebook,
        "it has no 8-bit activations": scheme.activation is not None,
        "it has no double quantization": weight.scale_scheme is not None,
        "its zero points are whole numbers, not floats": weight.zero == "float",
        "its groups run along the input features alone": weight.axis != 1,
        f"it has {reading.BITS} bits, not {weight.bits}": weight.bits != reading.BITS,
        f"the output features must be a multiple of 8, not {shape[0]}": shape[0] % 8 != 0,
    }
    reason = next((reason for reason, holds in reasons.items() if holds), None)
    if reason is None and weight.group is not None and shape[1] % weight.group:
        return f"groups of {weight.group} do not divide {shape[1]} input features"
    return reason


def refuse_together(records: Mapping[str, LayerRecord], ignored: Sequence[str]) -> str | None:
    """Why layers cannot be in one checkpoint: there is one setting for all, and exceptions go by parts of names."""
    schemes = list(dict.fromkeys(record.scheme.weight.name for record in records.values()))
    if len(schemes) > 1:
        return f"it has one setting for all layers, not {' and '.join(schemes[:3])}"
    reordered = next((name for name, record in records.items() if record.reordered), None)
    if reordered is not None:
        return f"the groups of {reordered} are not runs of consecutive columns"
    head = next((name for name in records if name.rpartition(".")[2] in HEADS), None)
    if head is not None:
        return f"its readers expect {head} in floating point"
    for part in ignored:
        name = next((name for name in records if part in name), None)
        if name is not None:
            return f"{part} is to stay in floating point, and {name}, which is not, has that in its name"
    return None


def encode(name: str, tensor: QuantizedTensor, scheme: LayerScheme) -> dict[str, Tensor]:
    """The tensors of the layer ``name`` by their names in the file.

    Raises:
        BitwrightError: BW205 if the format cannot store the layer.
    """
    scale = plain_scale(name, tensor, scheme, title="AWQ", reason=_obstacle(scheme, tensor.shape))
    middle = torch.full(scale.shape, reading.MIDDLE, dtype=torch.uint8)
    zero = middle if tensor.zero is None else unsigned_codes(tensor.zero, scheme.weight)
    return {
        f"{name}.qweight": _pack(unsigned_codes(tensor.codes, scheme.weight)),
        f"{name}.qzeros": _pack(zero),
        f"{name}.scales": float16_scales(name, scale).t().contiguous(),
    }


def _pack(codes: Tensor) -> Tensor:
    """Codes ``[out, n]`` as words ``[n, out/8]``."""
    eights = codes.t().contiguous().view(codes.shape[1], -1, 8)
    return bitpack.pack(eights[:, :, list(reading.ORDER)].flatten(1), reading.BITS)


def config(layers: Mapping[str, LayerRecord], ignored: Sequence[str]) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint with these layers.

    Layers of the blocks that stay float are said twice: GPTQModel knows the rules that it has for GPTQ alone.
    """
    weight = next(iter(layers.values())).scheme.weight
    rules: dict[str, dict[str, Any]] = {
        f"-:^{re.escape(name)}$": {} for name in ignored if any(map(str.isdecimal, name.split(".")))
    }
    return {
        "quant_method": reading.METHOD,
        "version": "gemm",
        "bits": reading.BITS,
        "group_size": -1 if weight.group is None else weight.group,
        "zero_point": not weight.symmetric,
        "modules_to_not_convert": list(ignored) or None,
        **({"dynamic": rules} if rules else {}),
    }


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
