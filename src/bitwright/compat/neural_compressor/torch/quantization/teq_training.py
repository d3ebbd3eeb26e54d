"""TEQ's scales as parameters of a prepared model, for the user's own training loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.compat.neural_compressor.torch.quantization.configs import TEQConfig
from bitwright.compat.neural_compressor.torch.quantization.conversion import Assignment
from bitwright.core.grid import FitOptions
from bitwright.core.scheme import LayerScheme
from bitwright.models.blocks import find_blocks
from bitwright.models.sites import find_sites
from bitwright.quantization.capture import capture, run_block
from bitwright.quantization.smoothing import apply_scale
from bitwright.quantization.stages import BlockTask
from bitwright.quantization.teq_module import TrainableSites, insert_scales

__all__ = ["ScaleTraining", "insert_trainable_scales"]


@dataclass(eq=False)
class ScaleTraining:
    """The trainable scales of a model, block by block, and how its own parameters were before they were frozen."""

    blocks: list[tuple[TrainableSites, bool]] = field(default_factory=list)  # with whether only folds are allowed
    frozen: list[tuple[nn.Parameter, bool]] = field(default_factory=list)

    @property
    def has_begun(self) -> bool:
        """Whether a scale has a gradient, or has been moved; loops may clear gradients at the end of a step."""
        scales = [alpha for sites, _ in self.blocks for alpha in sites.parameters()]
        return any(alpha.grad is not None or not bool((alpha == 1).all()) for alpha in scales)

    def remove(self) -> None:
        """Put the float layers back, to be trained as before."""
        for sites, _ in self.blocks:
            sites.remove()
        for parameter, wanted in self.frozen:
            parameter.requires_grad_(wanted)

    @torch.no_grad()
    def fold(self) -> dict[str, Tensor]:
        """Put the trained scales into the float layers, after :meth:`remove`.

        Returns, by layer, the float32 vector ``[in]`` that multiplies its input at run time because it could not be
        folded.
        """
        multipliers: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for sites, folding in self.blocks:
                task = _task(sites)
                for (site, _), scale in zip(sites.scales, sites.values(), strict=True):
                    if not bool((scale == 1).all()):
                        multipliers |= apply_scale(task, site, scale, folding=folding, hooks=hooks) or {}
        return multipliers


def insert_trainable_scales(assignment: Assignment, example_inputs: Any) -> ScaleTraining | None:
    """Put trainable scales in front of the layers that TEQ is for; every other parameter is frozen.

    ``example_inputs`` is a tensor, a tuple of arguments or a dictionary of keywords: the model is run on it once, to
    see which layers read the same activation. ``None`` where no layer has TEQ.
    """
    configs = {name: config for name, config in assignment.configs.items() if isinstance(config, TEQConfig)}
    wanted = {assignment.prefix + name: config for name, config in configs.items() if name in assignment.inside}
    if not wanted:
        return None
    model, schemes = assignment.blocks, {assignment.prefix + name: assignment.choices[name].scheme for name in configs}
    blocks = find_blocks(model)
    with torch.no_grad():
        captured = capture(model, blocks, [_forward(model, example_inputs)])
    training, hidden = ScaleTraining(), captured.inputs[0]
    training.frozen = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for name, block, calls in zip(blocks.names(), blocks.modules, captured.calls, strict=True):
        run = partial(run_block, block, hidden, calls[0])
        with torch.no_grad():
            hidden = run()
        layers = [layer for layer in wanted if layer.startswith(f"{name}.")]
        if layers:
            training.blocks.append(_insert(model, name, block, layers, wanted[layers[0]], schemes, run))
    for parameter, _ in training.frozen:
        parameter.requires_grad_(False)
    return training


def _insert(
    model: nn.Module,
    name: str,
    block: nn.Module,
    layers: Iterable[str],
    config: TEQConfig,
    schemes: Mapping[str, LayerScheme],
    run: Callable[[], Tensor],
) -> tuple[TrainableSites, bool]:
    modules = {layer: model.get_submodule(layer) for layer in layers}
    sites = find_sites(block, name, modules, run)
    if config.folding:
        sites = tuple(site for site in sites if site.fold is not None)
    options = FitOptions(
        symmetric_range="full" if config.use_full_range else "restricted", search=config.use_mse_search
    )
    return insert_scales(block, name, modules, schemes, sites, options), config.folding


def _task(sites: TrainableSites) -> BlockTask:
    """As much of a task as putting scales into a block takes: the block is not run."""
    run: Any = None
    return BlockTask(
        name=sites.name,
        block=sites.root,
        layers=sites.layers,
        linears={},
        sites=(),
        statistics={},
        inputs=(),
        reference_inputs=(),
        run=run,
        run_on=run,
        seed=0,
    )


def _forward(model: nn.Module, example_inputs: Any) -> Callable[[], object]:
    if isinstance(example_inputs, Mapping):
        return partial(model, **example_inputs)
    arguments = example_inputs if isinstance(example_inputs, tuple | list) else (example_inputs,)
    return partial(model, *arguments)
