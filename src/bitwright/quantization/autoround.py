"""AutoRound (Cheng et al. 2023, "Optimize Weight Rounding via Signed Gradient Descent"): a block learns its rounding.

Each weight has an offset V in [-0.5, 0.5] that is added before rounding, each group two multipliers in [0, 1] of its
range (equations 3 and 4). The sign of the gradient of the block's output error moves them by a step that falls linearly
to zero (algorithm 1); the iterate of least error is kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.grid import FitOptions
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme
from bitwright.models.blocks import linear_weight
from bitwright.quantization.block_loss import BlockLoss
from bitwright.quantization.fake_quant import OffsetWeight, can_follow
from bitwright.quantization.stages import BlockTask, Stage, Tuner
from bitwright.quantization.tuning import FORWARD_AND_BACKWARD, TunedLinear, gradients_enabled, stand_ins

__all__ = ["AUTOROUND", "AutoRoundOptions", "learn_rounding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoRoundOptions:
    """How rounding is learned.

    Attributes:
        iters: steps for each block; 0 rounds to nearest.
        lr: first step of an offset, in codes; ``None``: 1 / iters, so that an offset can just reach its bounds.
        minmax_tuning: learn the range multipliers too.
        minmax_lr: first step of a multiplier; ``None``: as ``lr``.
        lr_scheduler: ``linear``: the step falls to zero; ``constant``: it stays.
        batch_size: samples of one gradient.
        gradient_accumulate_steps: gradients added up for one step.
        sampler: ``rand``: each batch drawn anew; ``sequential``: one after the other.
        quantized_input: train on what the quantized blocks before hand on, instead of the float ones.
        not_use_best_mse: keep the last iterate instead of the best.
        dynamic_max_gap: stop after so many steps without a better iterate; -1: never.
        full_range: symmetric ranges that use the lowest code too.
        n_blocks: blocks that are tuned together, by the output of the last.
    """

    iters: int = 200
    lr: float | None = None
    minmax_tuning: bool = True
    minmax_lr: float | None = None
    lr_scheduler: Literal["linear", "constant"] = "linear"
    batch_size: int = 8
    gradient_accumulate_steps: int = 1
    sampler: Literal["rand", "sequential"] = "rand"
    quantized_input: bool = True
    not_use_best_mse: bool = False
    dynamic_max_gap: int = -1
    full_range: bool = False
    n_blocks: int = 1

    def __post_init__(self) -> None:
        _check("iters", self.iters, self.iters >= 0, "a whole number of at least 0")
        for name in ("lr", "minmax_lr"):
            value = getattr(self, name)
            _check(name, value, value is None or 0 < value <= 1, "a number above 0 and at most 1, or null")
        _check("lr_scheduler", self.lr_scheduler, self.lr_scheduler in ("linear", "constant"), "linear or constant")
        _check("batch_size", self.batch_size, self.batch_size >= 1, "a whole number of at least 1")
        count = self.gradient_accumulate_steps
        _check("gradient_accumulate_steps", count, count >= 1, "a whole number of at least 1")
        _check("n_blocks", self.n_blocks, self.n_blocks >= 1, "a whole number of at least 1")
        _check("sampler", self.sampler, self.sampler in ("rand", "sequential"), "rand or sequential")
        gap = self.dynamic_max_gap
        _check("dynamic_max_gap", gap, gap == -1 or gap >= 1, "-1, or a whole number of at least 1")

    @property
    def fit(self) -> FitOptions:
        return FitOptions(symmetric_range="full" if self.full_range else "restricted")


def learn_rounding(
    task: BlockTask, tensors: Mapping[str, QuantizedTensor], options: AutoRoundOptions
) -> Mapping[str, QuantizedTensor]:
    """Round the layers of ``task`` so that the block's output stays close to the float block's on the reference inputs.

    Starts from the float weights; ``tensors`` are returned where nothing better was found over all samples.

    Raises:
        BitwrightError: BW201 for schemes without counted codes or with rounded scales, BW401 without calibration.
    """
    if options.iters == 0 or not task.layers:
        return tensors
    if not task.inputs:
        what = f"autoround needs calibration samples for {task.name}"
        raise BitwrightError("BW401", what, suggestion="give calibration text, or round to nearest: --algorithm rtn")
    for name, scheme in task.linears.items():
        if (reason := _refuse(scheme.weight, options)) is not None:
            what = f"autoround cannot use {scheme.weight.name}, the scheme of {name}: {reason}"
            raise BitwrightError("BW201", what, suggestion="whole numbers such as w4g128, or another algorithm: gptq")
    with gradients_enabled():
        loss = BlockLoss(task, on_float_inputs=not options.quantized_input)
        weights = {
            name: OffsetWeight(linear_weight(layer), task.linears[name].weight, options.fit)
            for name, layer in task.layers.items()
        }
        with stand_ins(task.block, task.layers) as layers:
            found = _descend(loss, layers, weights, options, task.seed)
            if not found:  # no step had a finite error
                return tensors
            start_error, error = (_error_of(loss, layers, candidate) for candidate in (tensors, found))
    return found if error < start_error else tensors


def _descend(
    loss: BlockLoss,
    layers: Mapping[str, TunedLinear],
    weights: Mapping[str, OffsetWeight],
    options: AutoRoundOptions,
    seed: int,
) -> Mapping[str, QuantizedTensor]:
    """Algorithm 1: the best iterate by the error on the batches seen, as the paper's own implementation keeps it."""
    batches = _batches(loss.count, options, torch.Generator().manual_seed(seed))
    best: Mapping[str, QuantizedTensor] = {}
    rounded: dict[str, Tensor] = {}
    least, since = float("inf"), 0
    for step in range(options.iters):
        for name, layer in layers.items():
            layer.weight = weights[name].decode(loss.dtype, into=rounded.get(name)).requires_grad_()
        error = 0.0
        for _ in range(options.gradient_accumulate_steps):
            error += loss.backward(next(batches))
        since += 1
        if error < least:
            least, since = error, 0
            if not options.not_use_best_mse:
                best = {name: each.tensor(into=best.get(name)) for name, each in weights.items()}
        if 0 < options.dynamic_max_gap <= since:
            break
        left = 1 - step / options.iters if options.lr_scheduler == "linear" else 1.0
        for name, layer in layers.items():
            _move(weights[name], layer.weight.grad, left, options)
            rounded[name] = layer.weight = layer.weight.detach()  # without the gradient
    return {name: each.tensor() for name, each in weights.items()} if options.not_use_best_mse else best


def _move(weight: OffsetWeight, grad: Tensor | None, left: float, options: AutoRoundOptions) -> None:
    """One step against the sign of the gradient; a layer that no sample of the batch went through stays."""
    if grad is None:
        return
    lr = options.lr or 1 / options.iters
    by_low, by_high = weight.step(grad, lr * left)
    if options.minmax_tuning:
        size = (options.minmax_lr or lr) * left
        weight.low.sub_(by_low.sign_(), alpha=size).clamp_(0, 1)
        weight.high.sub_(by_high.sign_(), alpha=size).clamp_(0, 1)


@torch.no_grad()
def _error_of(loss: BlockLoss, layers: Mapping[str, TunedLinear], tensors: Mapping[str, QuantizedTensor]) -> float:
    for name, layer in layers.items():
        layer.weight = tensors[name].dequantize(loss.dtype)
    return loss.mean()


def _batches(count: int, options: AutoRoundOptions, generator: torch.Generator) -> Iterator[Sequence[int]]:
    size, start = min(options.batch_size, count), 0
    while True:
        if options.sampler == "rand":
            yield torch.randperm(count, generator=generator)[:size].tolist()
        else:
            yield [(start + index) % count for index in range(size)]
            start = (start + size) % count


def _refuse(scheme: QuantScheme, options: AutoRoundOptions) -> str | None:
    """Why the rounding to the codes of ``scheme`` cannot be learned, or ``None``."""
    if can_follow(scheme):
        return options.fit.refuse(scheme)
    return "it learns the rounding to counted codes, of two bits or more, on scales that are plain numbers"


def _check(field: str, value: object, is_valid: bool, accepted: str) -> None:
    if not is_valid:
        raise ArgumentError("BW201", f"autoround option {field} is {value!r}", suggestion=accepted)


def _passes(options: AutoRoundOptions, samples: int) -> float:
    return FORWARD_AND_BACKWARD * options.iters * options.gradient_accumulate_steps * min(options.batch_size, samples)


AUTOROUND: Stage[Tuner] = Stage("autoround", AutoRoundOptions, learn_rounding, _refuse, _passes)
