"""From configurations to what becomes of each layer of a model."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from bitwright.compat.neural_compressor.torch.quantization.autoround_config import AutoRoundConfig
from bitwright.compat.neural_compressor.torch.quantization.composition import ComposedConfig
from bitwright.compat.neural_compressor.torch.quantization.config import DTYPES, FLOAT, LocalRule, WeightOnlyConfig
from bitwright.compat.neural_compressor.torch.quantization.configs import HQQConfig
from bitwright.core.errors import ArgumentError
from bitwright.core.recipe import OUTPUT_HEADS, Choice, Recipe
from bitwright.core.scheme import LayerScheme, QuantScheme
from bitwright.models.blocks import is_linear, output_head

__all__ = ["LayerRecipe", "choose", "weight_scheme"]

SCALE_DTYPES = {
    "float16": torch.float16, "fp16": torch.float16, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16,
    "float32": torch.float32, "fp32": torch.float32,
}  # fmt: skip
GLOBAL_RANK, TYPE_RANK, PATTERN_RANK, EXACT_RANK = range(4)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRecipe(Recipe):
    """A recipe in which every layer's choice is made already: a layer that is not in ``choices`` stays as it is."""

    choices: Mapping[str, Choice] = field(default_factory=dict)

    def choice_for(self, name: str, type_name: str, *, is_head: bool | None = None) -> Choice | None:
        return self.choices.get(name)


def choose(model: nn.Module, config: ComposedConfig) -> dict[str, WeightOnlyConfig]:
    """The configuration of each linear layer that is to be quantized, by full name.

    A name rule is stronger than a type rule, and that than an algorithm's own fields; among name rules an exact name is
    the strongest; among equals the last one wins. The output head is only quantized where a name rule says so, or the
    configuration that it falls under has ``quant_lm_head``.

    Raises:
        ArgumentError: BW208 for a rule that matches no layer.
    """
    layers = {name: module for name, module in model.named_modules() if name and is_linear(module)}
    types = {type(module).__name__ for module in layers.values()}
    for member in config.members:
        for rule in member.config.local:
            _check_rule(rule, layers, types)
    head = output_head(model)
    chosen = {}
    for name, module in layers.items():
        is_head = module is head[1] if head is not None else name.rpartition(".")[2] in OUTPUT_HEADS
        found = _strongest(name, type(module).__name__, config, names=layers, types=types)
        if found is None or found[1].dtype == FLOAT:
            continue
        rank, selected = found
        if not is_head or rank >= PATTERN_RANK or selected.quant_lm_head:
            chosen[name] = selected
    return chosen


def weight_scheme(config: WeightOnlyConfig) -> LayerScheme:
    """What the fields say is stored.

    Raises:
        ArgumentError: BW202 if no such scheme exists.
    """
    code = DTYPES[config.dtype]
    is_float_zero = isinstance(config, HQQConfig) and not config.use_sym and not config.quant_zero
    scale_dtype = SCALE_DTYPES[config.scale_dtype] if isinstance(config, AutoRoundConfig) else torch.float16
    weight = QuantScheme(
        code="uint" if code == "int" and not config.use_sym else code,  # type: ignore[arg-type]
        bits=config.bits,
        group=_group(config.group_size),
        axis=getattr(config, "group_dim", 1),
        symmetric=config.use_sym,
        zero="float" if is_float_zero else "integer",
        scale_dtype=scale_dtype,
        scale_scheme=_scale_scheme(config),
    )
    return LayerScheme(weight=weight)


def _scale_scheme(config: WeightOnlyConfig) -> QuantScheme | None:
    if isinstance(config, HQQConfig) and config.quant_scale:
        group = _group(config.scale_quant_group_size)
        return QuantScheme(code="uint", bits=8, group=group, symmetric=False, scale_dtype=torch.float32)
    if not config.use_double_quant:
        return None
    return QuantScheme(
        code="int" if config.double_quant_use_sym else "uint",
        bits=config.double_quant_bits,
        group=_group(config.double_quant_group_size),
        symmetric=config.double_quant_use_sym,
        scale_dtype=torch.float32,
    )


def _group(size: int) -> int | None:
    return None if size == -1 else size


def _strongest(
    name: str, type_name: str, config: ComposedConfig, *, names: Mapping[str, nn.Module], types: set[str]
) -> tuple[int, WeightOnlyConfig] | None:
    """The configuration that a layer falls under, and how strong a word that is."""
    best: tuple[int, WeightOnlyConfig] | None = None
    for rank, candidate in _matching(name, type_name, config, names, types):
        # Where no rule speaks, an algorithm that quantizes is not silenced by another that leaves layers alone.
        if best is None or rank > best[0] or (rank == best[0] and (rank > GLOBAL_RANK or candidate.dtype != FLOAT)):
            best = (rank, candidate)
    return best


def _matching(
    name: str, type_name: str, config: ComposedConfig, names: Mapping[str, nn.Module], types: set[str]
) -> Iterator[tuple[int, WeightOnlyConfig]]:
    for member in config.members:
        if member.has_global:
            yield GLOBAL_RANK, member.config
    for member in config.members:
        for rule in member.config.local:
            # A class given by name ("Linear") is told from a layer's name by what the model has.
            if rule.is_type or (rule.pattern in types and rule.pattern not in names):
                if re.fullmatch(rule.pattern, type_name):
                    yield TYPE_RANK, rule.config
            elif rule.pattern == name:
                yield EXACT_RANK, rule.config
            elif re.fullmatch(rule.pattern, name):
                yield PATTERN_RANK, rule.config


def _check_rule(rule: LocalRule, layers: Mapping[str, nn.Module], types: set[str]) -> None:
    try:
        pattern = re.compile(rule.pattern)
    except re.error as error:
        message = f"{rule.pattern!r} is not a regular expression: {error}"
        raise ArgumentError("BW201", message, suggestion="escape special characters with a backslash") from None
    known = sorted(types) if rule.is_type else [*layers, *types]
    if any(pattern.fullmatch(name) for name in known) or rule.pattern in (*known, *OUTPUT_HEADS):
        return
    near = difflib.get_close_matches(rule.pattern, known, n=3, cutoff=0.0)
    raise ArgumentError(
        "BW208",
        f"the rule for {rule.pattern!r} matches no layer",
        why="a pattern is a regular expression that must match the whole name",
        suggestion="nearest: " + ", ".join(near),
    )
