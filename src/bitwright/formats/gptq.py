"""The GPTQ format of AutoGPTQ, GPTQModel, vLLM and others, in its two versions.

Tensors of a layer ``[N out, K in]`` with ``G`` groups of columns: ``NAME.qweight`` int32 ``[K·bits/32, N]``, the codes
of one output feature packed down a column, least bit first (3 bits too: one continuous stream); ``NAME.qzeros`` int32
``[G, N·bits/32]``, packed along the output features; ``NAME.scales`` float16 ``[G, N]``; ``NAME.g_idx`` int32 ``[K]``,
the group of each column. Codes and zero points count from 0: those of symmetric schemes have the zero point
``2^(bits-1)``. Version 1 (``checkpoint_format`` "gptq") stores each zero point less one, modulo ``2^bits``; version 2
("gptq_v2") as it is.

Readers of version 1 add one to whole words, which spoils a zero point of 0. So ``gptq`` writes symmetric layers in
version 1, which everybody reads, and asymmetric ones in version 2; ``gptq_v1`` and ``gptq_v2`` write one version.
``find_format`` picks, of the three, the one that writes a checkpoint as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bitwright.core import bitpack
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme
from bitwright.formats import gptq_reading as reading
from bitwright.formats.gptq_settings import AUTO_ROUND_VERSIONS, BITS, METHOD, VERSIONS, is_auto_round, version_of
from bitwright.formats.records import Format, LayerRecord, plain_scale
from bitwright.formats.stored import float16_scales, unsigned_codes

__all__ = ["FORMAT", "FORMAT_V1", "FORMAT_V2", "config", "encode", "recognize", "refuse", "refuse_together"]

GROUPS = (16, 32, 64, 128, 256, 512, 1024)  # that its readers know
PRODUCER = "bitwright"


def refuse(scheme: LayerScheme, shape: tuple[int, int]) -> str | None:
    """Why this format cannot store a layer ``shape`` (``[out, in]``), or its readers not load it; else ``None``."""
    reason, weight = _obstacle(scheme, shape), scheme.weight
    if reason is None and weight.scale_dtype != torch.float16:
        return "its scales are float16"
    if reason is not None or weight.group is None:
        return reason
    if shape[1] % weight.group:
        divisors = [size for size in reversed(GROUPS) if shape[1] % size == 0]
        fitting = f" (these do: {', '.join(map(str, divisors))})" if divisors else ""
        return f"groups of {weight.group} do not divide {shape[1]} input features{fitting}"
    if weight.group not in GROUPS:
        return f"its readers know groups of {', '.join(map(str, GROUPS))}, not {weight.group}"
    return None


def _obstacle(scheme: LayerScheme, shape: tuple[int, int]) -> str | None:
    """What in a layer the tensors of this format cannot hold."""
    weight = scheme.weight
    reasons = {
        f"it has no {weight.code} codes": weight.is_codebook,
        "it has no 8-bit activations": scheme.activation is not None,
        "it has no double quantization": weight.scale_scheme is not None,
        "its zero points are whole numbers, not floats": weight.zero == "float",
        "its groups run along the input features alone": weight.axis != 1,
        f"it has {', '.join(map(str, BITS))} bits, not {weight.bits}": weight.bits not in BITS,
        f"the shape must be of multiples of 32, not {shape[0]} x {shape[1]}": shape[0] % 32 != 0 or shape[1] % 32 != 0,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def refuse_together(records: Mapping[str, LayerRecord], ignored: Sequence[str], version: int | None) -> str | None:
    """Why layers cannot be in one checkpoint: the version is one for all."""
    kinds = {record.scheme.weight.symmetric for record in records.values()}
    if version is None and len(kinds) > 1:
        return "symmetric layers are stored in version 1 and asymmetric ones in version 2; gptq_v2 stores both"
    return None


def encode(name: str, tensor: QuantizedTensor, scheme: LayerScheme, version: int | None = None) -> dict[str, Tensor]:
    """The tensors of the layer ``name`` by their names in the file; ``version``: 1, 2 or, if not given, by symmetry.

    Raises:
        BitwrightError: BW205 if the format cannot store the layer.
    """
    reason, weight = _obstacle(scheme, tensor.shape), scheme.weight
    scale = plain_scale(name, tensor, scheme, title="GPTQ", reason=reason, may_reorder=True)
    bits, columns = weight.bits, tensor.shape[1]
    middle = torch.full(scale.shape, 1 << (bits - 1), dtype=torch.uint8)
    zero = middle if tensor.zero is None else unsigned_codes(tensor.zero, weight)
    if (version or (1 if weight.symmetric else 2)) == 1:
        zero = (zero - 1) & ((1 << bits) - 1)
    index = tensor.group_index
    if index is None:
        index = torch.arange(columns, dtype=torch.int32) // (weight.group or columns)
    return {
        f"{name}.qweight": bitpack.pack(unsigned_codes(tensor.codes, weight), bits).t().contiguous(),
        f"{name}.qzeros": bitpack.pack(zero.t().contiguous(), bits),
        f"{name}.scales": float16_scales(name, scale).t().contiguous(),
        f"{name}.g_idx": index,
    }


def config(layers: Mapping[str, LayerRecord], ignored: Sequence[str], version: int | None = None) -> dict[str, Any]:
    """The ``quantization_config`` of a checkpoint with these layers: the commonest setting, and a rule for each other.

    Layers of the blocks that stay float get a rule that skips them and, if they are the same in every block, are left
    out of ``modules_in_block_to_quantize``, since no reader knows both.
    """
    # One value of desc_act for all: readers then look at g_idx, which every layer has.
    reordered = any(record.reordered for record in layers.values())
    settings = {name: _layer_config(record) | {"desc_act": reordered} for name, record in layers.items()}
    kinds = list(settings.values())
    common = max(kinds, key=kinds.count)
    symmetric = all(record.scheme.weight.symmetric for record in layers.values())
    version = version or (1 if symmetric else 2)
    dynamic: dict[str, dict[str, Any]] = {
        f"+:^{re.escape(name)}$": {key: value for key, value in setting.items() if value != common[key]}
        for name, setting in settings.items()
        if setting != common
    }
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in ignored if _within_block(name) is not None}
    modules = _quantized_modules(layers, ignored)
    return {
        "quant_method": METHOD,
        "checkpoint_format": next(name for name, number in VERSIONS.items() if number == version),
        **common,
        "lm_head": any(_within_block(name) is None for name in layers),
        **({"dynamic": dynamic} if dynamic else {}),
        **({"modules_in_block_to_quantize": [modules]} if modules else {}),
        "pack_dtype": "int32",
        "meta": {"quantizer": [PRODUCER]},
    }


def _layer_config(record: LayerRecord) -> dict[str, Any]:
    weight = record.scheme.weight
    size = -1 if weight.group is None else weight.group
    return {"bits": weight.bits, "group_size": size, "sym": weight.symmetric}


def _within_block(name: str) -> str | None:
    """The name of a layer within its block: what follows the number of the block; ``None`` outside of blocks."""
    parts = name.split(".")
    number = next((position for position, part in enumerate(parts) if part.isdecimal()), None)
    return None if number is None else ".".join(parts[number + 1 :])


def _quantized_modules(layers: Mapping[str, LayerRecord], ignored: Sequence[str]) -> list[str]:
    """The layers of a block that are quantized, if that is the same in all blocks and some are not; else nothing."""
    taken = {inner: None for name in layers if (inner := _within_block(name)) is not None}
    left = {inner for name in ignored if (inner := _within_block(name)) is not None}
    return list(taken) if left and left.isdisjoint(taken) else []


def recognize(quantization: Mapping[str, Any]) -> bool:
    """Whether a ``quantization_config`` is of this format, whatever its version."""
    return quantization.get("quant_method") == METHOD or is_auto_round(quantization, AUTO_ROUND_VERSIONS)


def _recognize_version(quantization: Mapping[str, Any], version: int) -> bool:
    """Whether a checkpoint is of ``version`` where ``gptq`` would have written the other one."""
    rules = quantization.get("dynamic")
    changes = rules.values() if isinstance(rules, dict) else ()
    is_mixed = any(isinstance(change, dict) and "sym" in change for change in changes)
    usual = 1 if quantization.get("sym", True) is True else 2
    return recognize(quantization) and version_of(quantization) == version and (is_mixed or version != usual)


def _format(name: str, version: int | None) -> Format:
    return Format(
        name=name,
        refuse=refuse,
        encode=partial(encode, version=version),
        config=partial(config, version=version),
        recognize=recognize if version is None else partial(_recognize_version, version=version),
        layers=reading.layers,
        decode=reading.decode,
        refuse_together=partial(refuse_together, version=version),
    )


FORMAT = _format("gptq", None)
FORMAT_V1 = _format("gptq_v1", 1)
FORMAT_V2 = _format("gptq_v2", 2)
