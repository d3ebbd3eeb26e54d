"""From a prepared model to a quantized one: the layers inside its blocks in the stream, the others one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.compat.neural_compressor.torch.quantization.autoround_config import AutoRoundConfig
from bitwright.compat.neural_compressor.torch.quantization.composition import ComposedConfig
from bitwright.compat.neural_compressor.torch.quantization.config import WeightOnlyConfig
from bitwright.compat.neural_compressor.torch.quantization.configs import RTNConfig, TEQConfig
from bitwright.compat.neural_compressor.torch.quantization.rules import LayerRecipe, choose, weight_scheme
from bitwright.compat.neural_compressor.torch.quantization.weight_only_linear import WeightOnlyLinear
from bitwright.core.errors import BitwrightError
from bitwright.core.recipe import Choice
from bitwright.models.blocks import find_blocks, linears, output_head, refuse_other_products, set_module
from bitwright.models.quantized import QuantizedLinear
from bitwright.quantization.algorithms import make_method, parse_options
from bitwright.quantization.session import Prepared
from bitwright.quantization.session import convert as convert_blocks
from bitwright.quantization.sources import Source
from bitwright.quantization.statistics import collect_statistics
from bitwright.quantization.stream import quantized_linear, round_layers

__all__ = ["Assignment", "Batch", "as_one_block", "assign", "quantize_layers"]

Batch = tuple[tuple[Any, ...], dict[str, Any]]  # the arguments of one call of the model


@dataclass(frozen=True, slots=True)
class Assignment:
    """Which configuration each layer has.

    Attributes:
        configs: by layer name; other layers stay as they are.
        inside: the layers that the block stream works on, in ``blocks``; all others are quantized by themselves.
        blocks: the model that the stream sees, where a model without blocks is a single one.
        prefix: of the layers' names in it.
    """

    configs: Mapping[str, WeightOnlyConfig]
    inside: frozenset[str]
    blocks: nn.Module
    prefix: str

    @property
    def choices(self) -> dict[str, Choice]:
        return {name: _choice(config) for name, config in self.configs.items()}


class _WholeModel(nn.Module):
    """A model without blocks, as the only block of one."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([model])
        self._signature = inspect.signature(model.forward)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        bound = self._signature.bind(*arguments, **keywords)  # a block gets its first argument by position
        return self.blocks[0](*bound.args, **bound.kwargs)


def assign(model: nn.Module, config: ComposedConfig) -> Assignment:
    """Decide what becomes of each layer, and refuse what cannot be done, before anything is touched.

    Raises:
        BitwrightError: BW201, BW202 or BW208 for rules and fields that do not fit the model, BW313 if no layer is left
            to quantize, or the blocks are of a kind that cannot be quantized yet.
    """
    configs = choose(model, config)
    if not configs:
        raise BitwrightError(
            "BW313",
            "no layer is left to quantize",
            why="every linear layer of the model is excluded by a rule, or there is none",
            suggestion="drop some of the rules; the output head is quantized with quant_lm_head=True",
        )
    for each in configs.values():
        choice = _choice(each)
        parse_options(choice.algorithm, choice.options)
    if not _has_blocks(model):
        return as_one_block(model, Assignment(configs, frozenset(), model, ""))
    blocks = find_blocks(model)
    reached = {
        name for block, part in zip(blocks.names(), blocks.modules, strict=True) for name in linears(part, block)
    }
    head = output_head(model)
    reached |= {head[0]} if head is not None else set()
    return Assignment(configs, frozenset(reached & set(configs)), model, "")


def as_one_block(model: nn.Module, assignment: Assignment) -> Assignment:
    """The same configurations for ``model`` as a single block, whatever lists of modules it has."""
    return Assignment(assignment.configs, frozenset(assignment.configs), _WholeModel(model), "blocks.0.")


def quantize_layers(
    model: nn.Module,
    assignment: Assignment,
    batches: Sequence[Batch],
    *,
    source: Source | None = None,
    multipliers: Mapping[str, Tensor] | None = None,
) -> None:
    """Put a :class:`WeightOnlyLinear` in the place of each assigned layer of ``model``.

    ``source`` is where the weights are of a model that is empty as yet; all of it is in memory afterwards. With
    ``multipliers`` (from :meth:`ScaleTraining.fold`) the layers of TEQ are scaled already, and only rounded.

    Raises:
        BitwrightError: BW401 if an algorithm needs calibration and there are no batches; BW309, BW601 or BW602 for
            numbers that are not finite; BW313 for layers that do more than to multiply by their weight.
    """
    refuse_other_products({name: model.get_submodule(name) for name in assignment.configs})
    choices = assignment.choices
    if multipliers is not None:
        scaled = {name: choice for name, choice in choices.items() if choice.algorithm == TEQConfig.algorithm}
        rounding = {name: _rounding(choice) for name, choice in scaled.items()}
        _quantize_inside(assignment, rounding, (), source)
        _quantize_others(model, {name: rounding[name] for name in rounding if name not in assignment.inside}, ())
        for name, multiplier in multipliers.items():
            model.get_submodule(name.removeprefix(assignment.prefix)).register_buffer("input_scale", multiplier)
        choices = {name: choice for name, choice in choices.items() if name not in scaled}
    _quantize_inside(assignment, choices, batches, source)
    _quantize_others(model, {name: choices[name] for name in choices if name not in assignment.inside}, batches)
    for name, config in assignment.configs.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        set_module(model, name, WeightOnlyLinear.adopt(layer, config.algorithm))


def _quantize_inside(
    assignment: Assignment, choices: Mapping[str, Choice], batches: Sequence[Batch], source: Source | None
) -> None:
    """Quantize those of ``choices`` that the block stream reaches."""
    inside = {assignment.prefix + name: choices[name] for name in choices if name in assignment.inside}
    if not inside:
        return
    first = next(iter(inside.values()))
    seeds = [config.seed for config in assignment.configs.values() if isinstance(config, AutoRoundConfig)]
    seed = seeds[0] if seeds else 0
    recipe = LayerRecipe(scheme=first.scheme, algorithm=first.algorithm, seed=seed, choices=inside)
    prepared = Prepared(assignment.blocks, recipe, "pad")
    prepared.batches, prepared.source = list(batches), source
    convert_blocks(prepared)


def _rounding(choice: Choice) -> Choice:
    """What is left of TEQ where its scales are in the weights already."""
    options = {name.removeprefix("rtn."): value for name, value in choice.options.items() if name.startswith("rtn.")}
    return Choice(choice.scheme, RTNConfig.algorithm, options)


@torch.no_grad()
def _quantize_others(model: nn.Module, choices: Mapping[str, Choice], batches: Sequence[Batch]) -> None:
    """Round layers outside the blocks, each by itself. (Where an algorithm needs a block, that is to nearest.)"""
    if not choices:
        return
    layers = {name: model.get_submodule(name) for name in choices}
    schemes = {name: choice.scheme for name, choice in choices.items()}
    methods = {name: make_method(choice.algorithm, choice.options) for name, choice in choices.items()}
    calibrated = {name: layers[name] for name in layers if methods[name].algorithm.with_gram}
    statistics = {}
    if calibrated:
        if not batches:
            raise BitwrightError(
                "BW401",
                f"{choices[next(iter(calibrated))].algorithm} needs calibration data, and the model was never run",
                suggestion="run the prepared model on some batches before converting it",
            )
        forwards: list[Callable[[], object]] = [partial(model, *batch[0], **batch[1]) for batch in batches]
        statistics = dict(collect_statistics(calibrated, forwards, with_gram=True).statistics)
    rounded = round_layers(layers, schemes, methods, statistics, is_calibrated=bool(batches))
    for name, made in rounded.items():
        set_module(model, name, quantized_linear(layers[name], made.tensor, schemes[name]))


def _choice(config: WeightOnlyConfig) -> Choice:
    return Choice(weight_scheme(config), config.algorithm, config.algorithm_options())


def _has_blocks(model: nn.Module) -> bool:
    """Whether some list of modules has linear layers in each."""
    lists = (module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module))
    return any(all(linears(block, "") for block in blocks) for blocks in lists)
