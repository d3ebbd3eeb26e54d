"""The ``config_groups`` of a compressed-tensors configuration: which numbers which layers are stored in."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from bitwright.core.errors import BitwrightError
from bitwright.core.scheme import DYNAMIC_FP8, DYNAMIC_INT8, QuantScheme
from bitwright.formats.checkpoint import CONFIG, Checkpoint
from bitwright.formats.patterns import compile_pattern

__all__ = ["ConfigGroup", "find_group", "read_groups"]

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision")
ACTIVATIONS = {"int": DYNAMIC_INT8, "float": DYNAMIC_FP8}
MAX_GROUPS = 4096


@dataclass(frozen=True, slots=True)
class ConfigGroup:
    """One group: whom it is for, and the numbers that its layers are stored in.

    ``is_float``: e4m3 numbers, else whole ones; ``size``: columns per scale.
    """

    names: frozenset[str]
    patterns: tuple[re.Pattern[str], ...]
    is_general: bool
    is_float: bool
    bits: int
    symmetric: bool
    size: int | None
    activation: QuantScheme | None


def read_groups(checkpoint: Checkpoint) -> tuple[ConfigGroup, ...]:
    """All groups that have weights, in order.

    Raises:
        BitwrightError: BW311 for groups of a kind that is not read.
    """
    quantization = checkpoint.quantization or {}
    name = str(quantization.get("format"))
    if name not in FORMATS:
        raise _refusal(checkpoint, f"format {name[:80]!r} is not one of {', '.join(FORMATS)}")
    if quantization.get("quantization_status", "compressed") != "compressed":
        raise _refusal(checkpoint, "quantization_status is not 'compressed'")
    if quantization.get("transform_config"):
        raise _refusal(checkpoint, "transform_config calls for rotations of the activations, which are not read")
    groups = quantization.get("config_groups")
    if not isinstance(groups, dict) or not 0 < len(groups) <= MAX_GROUPS:
        raise _refusal(checkpoint, "config_groups is not an object of groups")
    read = tuple(_read_group(checkpoint, str(key), group) for key, group in groups.items())
    return tuple(group for group in read if group is not None)


def find_group(checkpoint: Checkpoint, groups: tuple[ConfigGroup, ...], name: str) -> ConfigGroup:
    """The group of the layer ``name``: by its exact name, then by a pattern, then by its class.

    Raises:
        BitwrightError: BW311 if no group is for it.
    """
    for group in groups:
        if name in group.names:
            return group
    for group in groups:
        if any(pattern.match(name) for pattern in group.patterns):
            return group
    for group in groups:
        if group.is_general:
            return group
    raise _refusal(checkpoint, f"no group of config_groups is for the quantized layer {name}")


def _read_group(checkpoint: Checkpoint, key: str, group: Any) -> ConfigGroup | None:
    if not isinstance(group, dict):
        raise _refusal(checkpoint, f"group {key[:80]!r} is not an object")
    weights, targets = group.get("weights"), group.get("targets")
    if weights is None:
        return None
    are_names = isinstance(targets, list) and all(isinstance(name, str) for name in targets)
    if not isinstance(weights, dict) or not isinstance(targets, list) or not are_names:
        raise _refusal(checkpoint, f"group {key[:80]!r} has no weights and targets")
    if group.get("output_activations") is not None:
        raise _refusal(checkpoint, f"group {key[:80]!r} quantizes the outputs of layers, which is not read")
    bits, size = weights.get("num_bits"), _group_size(checkpoint, key, weights)
    symmetric = weights.get("symmetric", True)
    if type(symmetric) is not bool:
        raise _refusal(checkpoint, f"group {key[:80]!r} does not say whether it is symmetric")
    kind = weights.get("type", "int")
    is_float = kind == "float" and bits == 8 and symmetric and size is None
    if type(bits) is not int or not 2 <= bits <= 8 or not (is_float or kind == "int"):
        kinds = "whole numbers of 2 to 8 bits, and symmetric 8-bit floats with a scale a row"
        raise _refusal(checkpoint, f"group {key[:80]!r} has weights other than {kinds}")
    patterns = tuple(_compile(checkpoint, target[3:]) for target in targets if target.startswith("re:"))
    return ConfigGroup(
        names=frozenset(targets),
        patterns=patterns,
        is_general=any(re.fullmatch(r"[A-Z]\w*", target) is not None for target in targets),
        is_float=is_float,
        bits=bits,
        symmetric=symmetric,
        size=size,
        activation=_read_activation(checkpoint, key, group.get("input_activations")),
    )


def _group_size(checkpoint: Checkpoint, key: str, weights: dict[str, Any]) -> int | None:
    """Columns per scale; ``None`` for one scale per row, or one for all rows."""
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy is None:
        strategy = "group" if type(size) is int and size > 0 else "channel"
    if strategy in ("channel", "tensor"):
        return None
    if strategy != "group" or type(size) is not int or not 0 < size < 1 << 31:
        raise _refusal(checkpoint, f"group {key[:80]!r} has weights of the strategy {str(strategy)[:40]!r}")
    return size


def _read_activation(checkpoint: Checkpoint, key: str, activations: Any) -> QuantScheme | None:
    if activations is None:
        return None
    found = {"num_bits": 8, "type": "int", "symmetric": True, **(activations if isinstance(activations, dict) else {})}
    expected = {"num_bits": 8, "symmetric": True, "dynamic": True}
    kind, strategy, size = found["type"], found.get("strategy"), found.get("group_size")
    has_groups = strategy == "group" and kind == "int" and type(size) is int and 0 < size < 1 << 31
    if found | expected != found or kind not in ("int", "float") or not (has_groups or strategy == "token"):
        what = "dynamic symmetric 8-bit ones per token, or of whole numbers per group"
        raise _refusal(checkpoint, f"group {key[:80]!r} has activations other than {what}")
    return replace(DYNAMIC_INT8, group=size) if has_groups else ACTIVATIONS[kind]


def _compile(checkpoint: Checkpoint, pattern: str) -> re.Pattern[str]:
    try:
        return compile_pattern(pattern)
    except ValueError as error:
        raise _refusal(checkpoint, f"a target is refused: {error}") from error


def _refusal(checkpoint: Checkpoint, what: str) -> BitwrightError:
    suggestion = "bitwright reads pack-quantized, int-quantized and (8 bits) float-quantized checkpoints"
    return BitwrightError("BW311", what, where=str(checkpoint.directory / CONFIG), suggestion=suggestion)
