"""Everything decided before any work: which layer gets which scheme, in which format, and what it will take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from bitwright.core.errors import BitwrightError
from bitwright.core.recipe import Choice, Recipe
from bitwright.core.scheme import LayerScheme
from bitwright.formats import compressed_tensors
from bitwright.formats.records import Format, LayerRecord
from bitwright.models.blocks import Blocks, find_blocks, is_linear, linear_shape, linears, output_head
from bitwright.quantization.algorithms import Method, make_method, refuse_schemes
from bitwright.quantization.layout import choose_format, fit_readers, list_records, output_bytes
from bitwright.quantization.sources import Source
from bitwright.quantization.stages import Finisher, Stage
from bitwright.quantization.units import Unit, make_units

__all__ = ["FINISH", "GroupFallback", "Plan", "head_note", "make_plan"]

GroupFallback = Literal["error", "pad", "per-channel", "skip"]
GROUP_FALLBACKS = ("error", "pad", "per-channel", "skip")
FINISH = "finish"  # the pass over the whole model at the end, in the journal
GPTQ_HEAD = ("the output head is quantized: GPTQModel loads that, transformers gives the head random weights",)
BLOCK_WIDE = ("n_blocks", "true_sequential")  # options that say how whole blocks are gone through
USUAL_GROUPS = (256, 128, 64, 32, 16)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """``skipped``: linear layers left in floating point. ``overridden``: quantized layers whose scheme or algorithm is
    not that of the recipe. ``untied``: a tied head is stored apart from now on."""

    units: tuple[Unit, ...]
    blocks: Blocks
    format: Format
    schemes: Mapping[str, LayerScheme]
    methods: Mapping[str, Method]
    overridden: tuple[str, ...]
    shapes: Mapping[str, tuple[int, int]]
    skipped: tuple[str, ...]
    untied: bool
    notices: tuple[str, ...]
    source_bytes: int
    output_bytes: int

    @property
    def records(self) -> dict[str, LayerRecord]:
        """What the format is told of each layer."""
        return list_records(self.schemes, self.shapes, self.methods)

    @property
    def is_calibrated(self) -> bool:
        """Whether some layer's algorithm needs calibration data."""
        return any(method.algorithm.calibrated for method in self.methods.values())

    @property
    def with_float_flow(self) -> bool:
        """Whether some layer's algorithm needs the hidden states of the float model."""
        return self.finish is not None or any(method.algorithm.with_float_flow for method in self.methods.values())

    @property
    def is_equalized(self) -> bool:
        """Whether the float weights of some layer change before they are rounded."""
        return any(method.algorithm.equalize for method in self.methods.values())

    @property
    def finish(self) -> tuple[Stage[Finisher], Any] | None:
        """The pass over the whole model at the end, with its options; the first layer's that has one, has it."""
        for method in self.methods.values():
            stage = method.algorithm.finish
            if stage is not None:
                return stage, method.options[stage.name]
        return None

    @property
    def unit_names(self) -> tuple[str, ...]:
        """What the journal of a run holds, in order: the units, then the steps of the pass at the end."""
        names = tuple(unit.name for unit in self.units)
        if self.finish is None:
            return names
        return (*names, FINISH, *(f"{FINISH}:{unit.name}" for unit in self.units if unit.is_block))


def make_plan(source: Source, recipe: Recipe, *, format: str | None, group_fallback: GroupFallback) -> Plan:
    """Decide the scheme of every layer and the format of the checkpoint.

    Raises:
        BitwrightError: BW201, BW204, BW205, BW208 or BW313, before any weight is read.
    """
    if group_fallback not in GROUP_FALLBACKS:
        accepted = "one of " + ", ".join(GROUP_FALLBACKS)
        raise BitwrightError("BW201", f"group_fallback is {group_fallback!r}", suggestion=accepted)
    model = source.model
    blocks = find_blocks(model)
    layers = _quantizable(model, blocks)
    every_linear = {name: module for name, module in model.named_modules() if name and is_linear(module)}
    embeddings = [(n, type(m).__name__) for n, m in model.named_modules() if isinstance(m, nn.Embedding)]
    recipe.check_overrides(((n, type(m).__name__) for n, m in every_linear.items()), embeddings=embeddings)
    shapes = {name: linear_shape(module) for name, module in layers.items()}
    _check_reach(recipe, layers, every_linear)
    head = output_head(model)
    choices = _choose(recipe, layers, None if head is None else head[1])
    schemes = {name: choice.scheme for name, choice in choices.items()}
    schemes, notices = _fit_groups(schemes, shapes, group_fallback)
    if not schemes:
        raise BitwrightError("BW313", "no layer is left to quantize", suggestion="drop some of the overrides")
    usual = make_method(recipe.algorithm, recipe.options)
    methods = _methods(usual, choices, schemes)
    skipped = tuple(name for name in every_linear if name not in schemes)
    chosen = choose_format(list_records(schemes, shapes, methods), skipped, layers, methods, format)
    if chosen.name == compressed_tensors.FORMAT.name:
        schemes, more = fit_readers(schemes, layers)
        notices += more
    head_quantized = head is not None and head[0] in schemes
    untied = head_quantized and head is not None and f"{head[0]}.weight" not in source.shapes()
    together = _blocks_together(methods)
    units = make_units(source, blocks, schemes, head[0] if head is not None and head_quantized else None, together)
    return Plan(
        units=units,
        blocks=blocks,
        format=chosen,
        schemes=schemes,
        methods=methods,
        overridden=tuple(n for n in schemes if (choices[n].scheme, methods[n]) != (recipe.scheme, usual)),
        shapes=shapes,
        skipped=skipped,
        untied=untied,
        notices=notices + (GPTQ_HEAD if head_quantized and chosen.name.startswith("gptq") else ()),
        source_bytes=source.byte_count(),
        output_bytes=output_bytes(source, schemes, shapes, chosen),
    )


def _quantizable(model: nn.Module, blocks: Blocks) -> dict[str, nn.Module]:
    """The linear layers inside blocks, then the output head."""
    found: dict[str, nn.Module] = {}
    for name, block in zip(blocks.names(), blocks.modules, strict=True):
        found |= linears(block, name)
    head = output_head(model)
    return found if head is None else found | {head[0]: head[1]}


def _choose(recipe: Recipe, layers: Mapping[str, nn.Module], head: nn.Module | None) -> dict[str, Choice]:
    """What the recipe says of each layer that it does not leave in floating point."""
    said = {
        name: recipe.choice_for(name, type(layer).__name__, is_head=layer is head) for name, layer in layers.items()
    }
    return {name: choice for name, choice in said.items() if choice is not None}


def head_note(method: Method) -> dict[str, str]:
    """The report's word on an output head whose algorithm does more to blocks than to it."""
    if not (method.algorithm.equalize or method.algorithm.tune):
        return {}
    return {"rounded_by": method.algorithm.round.name, "reason": "equalizing and tuning end with the blocks"}


def _blocks_together(methods: Mapping[str, Method]) -> int:
    """How many blocks are worked on together. Algorithms that would spoil each other's work are refused."""
    together = max(
        getattr(options, "n_blocks", 1) for method in methods.values() for options in method.options.values()
    )
    distinct = {id(method): method for method in methods.values()}.values()
    equalizing = next((method.name for method in distinct if method.algorithm.equalize), None)
    if together > 1 and equalizing is not None:
        what = f"n_blocks is {together}, and {equalizing} works on one block at a time"
        raise BitwrightError("BW201", what, suggestion="n_blocks=1")
    for kind in ("tune", "finish"):
        several = [method.name for method in distinct if getattr(method.algorithm, kind)]
        if len(several) > 1 and set(several) != {"autoround"}:  # which changes nothing but codes
            what = f"{' and '.join(several)} would both {kind} the same model"
            raise BitwrightError("BW201", what, suggestion="one algorithm of that kind, and plain ones beside it")
    return int(together)


def _methods(usual: Method, choices: Mapping[str, Choice], schemes: Mapping[str, LayerScheme]) -> dict[str, Method]:
    """Each layer's algorithm; layers of the same algorithm and options share one record."""
    made: dict[str, Method] = {}  # by what was given
    same: dict[str, Method] = {}  # by what that comes to
    methods: dict[str, Method] = {}
    first: dict[int, str] = {}  # by the record, the first layer that has it
    for name in schemes:
        choice = choices[name]
        given = f"{choice.algorithm} {sorted(choice.options.items())!r}"
        if given not in made:
            method = make_method(choice.algorithm, choice.options)
            made[given] = same.setdefault(f"{method.name} {method.options!r}", method)
        methods[name] = made[given]
        first.setdefault(id(made[given]), name)
    for name in first.values():
        _refuse_rotation(name, methods[name], usual)
    for field in BLOCK_WIDE:
        _refuse_two_values(field, {name: methods[name] for name in first.values()})
    refuse_schemes(methods, schemes)
    return methods


def _refuse_rotation(name: str, method: Method, usual: Method) -> None:
    """Refuse a rotation that only some layers would have."""
    rotate = method.algorithm.rotate
    if rotate is None:
        return
    if (method.name, method.options[rotate.name]) != (usual.name, usual.options.get(rotate.name)):
        what = f"{name}: {method.name} rotates the whole model, which an override cannot change"
        choice = f"--algorithm {method.name}, with the options of the rotation by --option, and no override of it"
        raise BitwrightError("BW201", what, suggestion=choice)


def _refuse_two_values(field: str, methods: Mapping[str, Method]) -> None:
    """Refuse values of an option that differ between layers where it says how whole blocks are gone through."""
    values = {
        name: getattr(options, field)
        for name, method in methods.items()
        for options in method.options.values()
        if hasattr(options, field)
    }
    different = dict(zip(values.values(), values, strict=True))
    if len(different) > 1:
        told = " and ".join(f"{value} for {name}" for value, name in different.items())
        what = f"{field} is {told}, and blocks are gone through in one way"
        raise BitwrightError("BW201", what, suggestion=f"one {field} for all layers, as an option of the run")


def _check_reach(recipe: Recipe, layers: Mapping[str, nn.Module], every: Mapping[str, nn.Module]) -> None:
    """Refuse overrides that give a scheme only to layers which are not quantized at all."""
    for override in recipe.overrides:
        matching = [name for name, module in every.items() if override.matches(name, type(module).__name__)]
        if override.scheme is not None and matching and not any(name in layers for name in matching):
            raise BitwrightError(
                "BW208",
                f"override {override.pattern!r} matches only {', '.join(matching[:5])}",
                why="that lies outside the model's blocks; only layers inside them, and the output head, are quantized",
                suggestion="drop the override",
            )


def _fit_groups(
    schemes: Mapping[str, LayerScheme], shapes: Mapping[str, tuple[int, int]], fallback: GroupFallback
) -> tuple[dict[str, LayerScheme], tuple[str, ...]]:
    """Settle the layers whose grouped dimension the group size does not divide; never in silence."""
    unfit = {name: scheme for name, scheme in schemes.items() if not scheme.has_whole_groups(shapes[name])}
    if not unfit:
        return dict(schemes), ()
    listed = ", ".join(list(unfit)[:5]) + (", ..." if len(unfit) > 5 else "")
    sizes = {shapes[name][scheme.weight.axis] for name, scheme in unfit.items()}
    if fallback == "error":
        grouped = {shapes[name][scheme.weight.axis] for name, scheme in schemes.items()}
        divisors = [group for group in USUAL_GROUPS if all(size % group == 0 for size in grouped)]
        known = f"group sizes that divide every layer: {', '.join(map(str, divisors)) or 'none of the usual ones'}"
        raise BitwrightError(
            "BW204",
            f"groups do not divide {len(unfit)} layers: {listed}",
            why=f"their grouped dimension is {', '.join(map(str, sorted(sizes)))}",
            suggestion=f"{known}; or --group-fallback pad (a shorter last group), per-channel, or skip",
        )
    settled: dict[str, LayerScheme | None] = dict(schemes)
    for name, scheme in unfit.items():
        per_channel = scheme.without_partial_groups(shapes[name])
        settled[name] = {"pad": scheme, "per-channel": per_channel, "skip": None}[fallback]
    outcome = {
        "pad": "get a shorter last group",
        "per-channel": "get one scale per channel",
        "skip": "stay in floating point",
    }
    notice = f"{len(unfit)} layers whose dimension the group size does not divide {outcome[fallback]}: {listed}"
    return {name: scheme for name, scheme in settled.items() if scheme is not None}, (notice,)
