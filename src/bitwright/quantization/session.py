"""Quantizing a module in memory: at once, or prepared, run by the user on data of their own, and converted."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from bitwright.core.errors import BitwrightError
from bitwright.core.recipe import Override, Recipe, parse_override
from bitwright.core.scheme import LayerScheme
from bitwright.core.scheme_names import parse
from bitwright.models.blocks import set_module
from bitwright.quantization.algorithms import parse_options
from bitwright.quantization.capture import Captured, capture, observe_head
from bitwright.quantization.plan import GroupFallback, Plan, make_plan
from bitwright.quantization.sources import MemorySource, refuse_nonfinite
from bitwright.quantization.statistics import SiteStatistics
from bitwright.quantization.stream import BlockWork, Flow, quantize_block, quantized_linear, round_layers

__all__ = ["Prepared", "convert", "prepare", "quantize_module"]


class Prepared(nn.Module):
    """A model that notes every batch it is run on, as calibration data for :func:`convert`.

    It computes what the model computes. Batches are kept until the conversion, in memory.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, group_fallback: GroupFallback) -> None:
        super().__init__()
        self.model = model
        self.recipe, self.group_fallback = recipe, group_fallback
        self.batches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        self.batches.append((arguments, keywords))
        return self.model(*arguments, **keywords)


def prepare(
    model: nn.Module,
    *,
    scheme: str | LayerScheme = "w4g128",
    algorithm: str = "rtn",
    options: Mapping[str, Any] | None = None,
    overrides: Sequence[str | Override] = (),
    seed: int = 0,
    group_fallback: GroupFallback = "error",
    inplace: bool = False,
) -> Prepared:
    """Wrap ``model`` (or a copy of it, unless ``inplace``) so that running it collects calibration data.

    Raises:
        BitwrightError: for schemes, options, overrides or group sizes that do not fit the model; nothing is changed.

    Example:
        >>> prepared = bitwright.prepare(model, scheme="w4g128")
        >>> for batch in batches:
        ...     prepared(**batch)
        >>> quantized = bitwright.convert(prepared)
    """
    rules = tuple(rule if isinstance(rule, Override) else parse_override(rule) for rule in overrides)
    stored = scheme if isinstance(scheme, LayerScheme) else parse(scheme)
    recipe = Recipe(scheme=stored, algorithm=algorithm, options=dict(options or {}), overrides=rules, seed=seed)
    parse_options(algorithm, recipe.options)
    make_plan(MemorySource(model), recipe, format="native", group_fallback=group_fallback)
    return Prepared(model if inplace else copy.deepcopy(model), recipe, group_fallback)


@torch.no_grad()
def convert(prepared: Prepared) -> nn.Module:
    """Quantize a prepared model, block by block, with the batches that it saw; return the model itself.

    Raises:
        BitwrightError: BW401 if the algorithm needs calibration and the model was never run; BW309 or BW601 for weights
            or activations that are not finite. The model is unchanged then.
    """
    model, recipe = prepared.model, prepared.recipe
    source = MemorySource(model)
    refuse_nonfinite(source)
    plan = make_plan(source, recipe, format="native", group_fallback=prepared.group_fallback)
    if plan.is_calibrated and not prepared.batches:
        raise BitwrightError(
            "BW401",
            f"{recipe.algorithm} needs calibration data, and the prepared model was never run",
            suggestion="run the prepared model on some batches before converting it",
        )
    forwards: list[Callable[[], object]] = [partial(model, *batch[0], **batch[1]) for batch in prepared.batches]
    originals: dict[str, nn.Module] = {name: model.get_submodule(name) for name in plan.schemes}
    modes = {module: module.training for module in model.modules()}
    model.train(False)  # dropout would make other statistics at every pass
    try:
        captured = capture(model, plan.blocks, forwards) if forwards else None
        _convert_units(model, recipe, plan, captured, forwards)
    except BaseException:
        for name, module in originals.items():
            set_module(model, name, module)
        raise
    finally:
        for module in model.modules():
            module.training = modes.get(module, modes[model])
    return model


def quantize_module(
    model: nn.Module,
    *,
    scheme: str | LayerScheme = "w4g128",
    algorithm: str = "rtn",
    options: Mapping[str, Any] | None = None,
    overrides: Sequence[str | Override] = (),
    seed: int = 0,
    group_fallback: GroupFallback = "error",
    inplace: bool = False,
) -> nn.Module:
    """Quantize a module without calibration data: :func:`prepare` and :func:`convert` in one call.

    The result is a copy unless ``inplace``. Its linear layers are ``QuantizedLinear`` and run from packed codes.
    """
    prepared = prepare(
        model,
        scheme=scheme,
        algorithm=algorithm,
        options=options,
        overrides=overrides,
        seed=seed,
        group_fallback=group_fallback,
        inplace=inplace,
    )
    return convert(prepared)


def _convert_units(
    model: nn.Module,
    recipe: Recipe,
    plan: Plan,
    captured: Captured | None,
    forwards: Sequence[Callable[[], object]],
) -> None:
    inputs = captured.inputs if captured is not None else ()
    references = inputs if plan.with_float_flow else None
    numbers = tuple(range(len(inputs)))
    for unit in plan.units:
        layers = {name: model.get_submodule(name) for name in unit.layers}
        if unit.is_block:
            flow = None
            if captured is not None:
                flow = Flow(inputs, tuple(captured.calls[block] for block in unit.blocks), numbers, references)
            work = BlockWork(
                name=unit.name,
                model=model,
                blocks=tuple(plan.blocks.modules[block] for block in unit.blocks),
                layers=layers,
                schemes=unit.layers,
                methods=plan.methods,
                flow=flow,
                seed=recipe.seed,
            )
            result = quantize_block(work)
            inputs, references = result.outputs, result.references
        elif layers:
            statistics: Mapping[str, SiteStatistics] = {}
            if captured is not None:
                gram = any(plan.methods[name].algorithm.with_gram for name in layers)
                statistics = observe_head(
                    model,
                    plan.blocks,
                    layers,
                    forwards,
                    inputs,
                    as_tuple=captured.as_tuple,
                    with_gram=gram,
                    numbers=numbers,
                )
            rounded = round_layers(layers, unit.layers, plan.methods, statistics, is_calibrated=captured is not None)
            for name, made in rounded.items():
                set_module(model, name, quantized_linear(layers[name], made.tensor, unit.layers[name]))
