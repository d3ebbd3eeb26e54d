"""The ``quantization_config`` of a GPTQ checkpoint: one setting for all layers, and rules that change it for some.

Old checkpoints have the same keys in ``quantize_config.json``. Those of AutoRound hold GPTQ tensors under another
``quant_method``, and exceptions in ``extra_config``.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import CONFIG, Checkpoint
from bitwright.formats.patterns import compile_pattern

__all__ = [
    "BITS",
    "METHOD",
    "LayerSettings",
    "Settings",
    "find_settings",
    "is_auto_round",
    "read_settings",
    "version_of",
]

METHOD = "gptq"
BITS = (2, 3, 4, 8)
VERSIONS = {"gptq": 1, "gptq_v2": 2}
AUTO_ROUND = ("auto-round", "intel/auto-round", "inc")
AUTO_ROUND_VERSIONS = {
    **dict.fromkeys(("auto_round:auto_gptq", "auto_round:gptqmodel", "auto_round:gptq", "auto_gptq"), 1),
    "auto_round": 2,  # of symmetric layers some are of version 1
}
MAX_RULES = 65536
MAX_PATTERNS = 1024
ONE_NAME = re.compile(r"\^((?:\w|\\?-|\\\.)+)\$")
FLOAT_BITS = 16  # AutoRound: a layer of this many bits or more is not quantized


@dataclass(frozen=True, slots=True)
class LayerSettings:
    """How a layer is stored; ``group``: columns per scale, ``None`` for one scale per output feature."""

    bits: int
    group: int | None
    symmetric: bool


@dataclass(frozen=True, slots=True)
class _Rule:
    """An exception: for which names, and what is different there; ``None``: they are not quantized.

    Of the rules that match a name the one of the least ``place`` counts.
    """

    names: str | re.Pattern[str]
    changes: Mapping[str, Any] | None
    place: int


@dataclass(frozen=True, slots=True)
class Settings:
    """The configuration, read: ``version`` 1 stores zero points less one.

    ``named``: rules for one name each, of which there may be thousands; ``rules``: the others. ``modules``: the layers
    of a block that are quantized, by their names within it; ``None``: all.
    """

    version: int
    common: LayerSettings
    named: Mapping[str, _Rule]
    rules: tuple[_Rule, ...]
    modules: tuple[str, ...] | None


def is_auto_round(quantization: Mapping[str, Any], packings: Mapping[str, Any]) -> bool:
    """Whether AutoRound wrote a checkpoint in one of ``packings``."""
    return quantization.get("quant_method") in AUTO_ROUND and _packing(quantization) in packings


def _packing(quantization: Mapping[str, Any]) -> str:
    return str(quantization.get("packing_format", quantization.get("backend")))


def version_of(quantization: Mapping[str, Any]) -> int | None:
    """1 or 2, as the configuration says; ``None`` for a layout that is neither."""
    if quantization.get("quant_method") in AUTO_ROUND:
        return AUTO_ROUND_VERSIONS.get(_packing(quantization))
    named = quantization.get("checkpoint_format", quantization.get("format", "gptq"))
    return VERSIONS.get(named) if isinstance(named, str) and not quantization.get("is_marlin_format") else None


def read_settings(checkpoint: Checkpoint) -> Settings:
    """The settings of a checkpoint.

    Raises:
        BitwrightError: BW311 for a layout, a number of bits or a rule that is not read.
    """
    quantization = checkpoint.quantization or {}
    version = version_of(quantization)
    if version is None:
        layout = quantization.get("checkpoint_format", quantization.get("format"))
        layout = _packing(quantization) if layout is None else layout
        layout = "marlin" if quantization.get("is_marlin_format") else str(layout)[:40]
        raise _refusal(checkpoint, f"the layout {layout!r} of GPTQ is not one of {', '.join(VERSIONS)}")
    rules, named = _rules(checkpoint), dict[str, _Rule]()
    for rule in rules:
        if isinstance(rule.names, str):
            named.setdefault(rule.names, rule)
    others = tuple(rule for rule in rules if not isinstance(rule.names, str))
    if len(others) > MAX_PATTERNS:
        raise _refusal(checkpoint, f"there are {len(others)} patterns of names; at most {MAX_PATTERNS} are read")
    common = _change(checkpoint, None, quantization)
    return Settings(version, common, named, others, _modules(checkpoint))


def find_settings(checkpoint: Checkpoint, settings: Settings, name: str) -> LayerSettings:
    """The settings of the quantized layer ``name``.

    Raises:
        BitwrightError: BW311 if the configuration says that this layer is not quantized.
    """
    candidates = [settings.named[name]] if name in settings.named else []
    matching = (rule for rule in settings.rules if isinstance(rule.names, re.Pattern) and rule.names.match(name))
    candidates += itertools.islice(matching, 1)
    rule = min(candidates, key=lambda rule: rule.place, default=None)
    if rule is not None and rule.changes is None:
        what = f"{name} is stored quantized, but a rule says that it is not"
        raise _refusal(checkpoint, what)
    is_in_block = any(part.isdecimal() for part in name.split("."))
    if settings.modules is not None and is_in_block and not name.endswith(settings.modules):
        what = f"{name} is stored quantized, but modules_in_block_to_quantize does not have it"
        raise _refusal(checkpoint, what)
    changes = {} if rule is None or rule.changes is None else rule.changes
    return _change(checkpoint, settings.common, changes)


def _change(checkpoint: Checkpoint, common: LayerSettings | None, fields: Mapping[str, Any]) -> LayerSettings:
    """Settings with some fields replaced; without ``common``, the fields are those of the whole checkpoint."""
    bits = fields.get("bits", common.bits if common else None)
    size = fields.get("group_size", (common.group or -1) if common else -1)
    symmetric = fields.get("sym", common.symmetric if common else True)
    if type(bits) is not int or bits not in BITS:
        raise _refusal(checkpoint, f"bits is {str(bits)[:40]}, not one of {', '.join(map(str, BITS))}")
    if size is None:
        size = -1
    if type(size) is not int or size < -1 or size == 0 or size >= 1 << 31:
        raise _refusal(checkpoint, f"group_size is {str(size)[:40]}, not a size or -1")
    if type(symmetric) is not bool:
        raise _refusal(checkpoint, f"sym is {str(symmetric)[:40]}, not true or false")
    if fields.get("data_type", "int") != "int":
        raise _refusal(checkpoint, f"data_type is {str(fields['data_type'])[:40]!r}, not 'int'")
    return LayerSettings(bits, None if size == -1 else size, symmetric)


def _rules(checkpoint: Checkpoint) -> tuple[_Rule, ...]:
    quantization = checkpoint.quantization or {}
    if quantization.get("quant_method") in AUTO_ROUND:
        return _auto_round_rules(checkpoint, quantization.get("extra_config"))
    dynamic = quantization.get("dynamic")
    rules: list[_Rule] = []
    for key, changes in _object(checkpoint, "dynamic", dynamic).items():
        is_skip = key.startswith("-:")
        if not is_skip and not isinstance(changes, dict):
            raise _refusal(checkpoint, f"the rule {key[:80]!r} of dynamic is not an object")
        pattern = key[2:] if key.startswith(("-:", "+:")) else key
        rules.append(_Rule(_names(checkpoint, "dynamic", pattern), None if is_skip else changes, len(rules)))
    return tuple(rules)


def _auto_round_rules(checkpoint: Checkpoint, extra: object) -> tuple[_Rule, ...]:
    """Names, or patterns of whole names; a layer may give only what is different."""
    rules: list[_Rule] = []
    for key, changes in _object(checkpoint, "extra_config", extra).items():
        if not isinstance(changes, dict):
            raise _refusal(checkpoint, f"the entry {key[:80]!r} of extra_config is not an object")
        bits = changes.get("bits")
        is_float = (type(bits) is int and bits >= FLOAT_BITS) or changes.get("data_type") in ("float", "fp")
        is_exact = re.fullmatch(r"[\w.\-]+", key) is not None
        source = f"^{re.escape(key)}$" if is_exact else f"(?:{key})$"
        place = len(rules) - (MAX_RULES if is_exact else 0)  # names come before patterns
        rules.append(_Rule(_names(checkpoint, "extra_config", source), None if is_float else changes, place))
    return tuple(rules)


def _modules(checkpoint: Checkpoint) -> tuple[str, ...] | None:
    """Endings of the names of layers within a block that are quantized: a list of names, or of lists of names."""
    stages = (checkpoint.quantization or {}).get("modules_in_block_to_quantize")
    if stages is None:
        return None
    names: list[Any] = []
    for stage in stages if isinstance(stages, list) else [None]:
        names += stage if isinstance(stage, list) else [stage]
    if not names or len(names) > MAX_RULES or not all(isinstance(name, str) and name for name in names):
        raise _refusal(checkpoint, "modules_in_block_to_quantize is not a list of names")
    return tuple(f".{name}" for name in names)


def _object(checkpoint: Checkpoint, field: str, value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_RULES:
        raise _refusal(checkpoint, f"{field} is not an object of rules")
    return value


def _names(checkpoint: Checkpoint, field: str, pattern: str) -> str | re.Pattern[str]:
    """The one name that a pattern means, or the pattern."""
    exact = ONE_NAME.fullmatch(pattern)
    if exact is not None:
        return exact[1].replace("\\", "")
    try:
        return compile_pattern(pattern)
    except ValueError as error:
        raise _refusal(checkpoint, f"a rule of {field} is refused: {error}") from error


def _refusal(checkpoint: Checkpoint, what: str) -> BitwrightError:
    suggestion = "bitwright reads GPTQ checkpoints of 2, 3, 4 and 8 bits, versions 1 and 2"
    return BitwrightError("BW311", what, where=str(checkpoint.directory / CONFIG), suggestion=suggestion)
