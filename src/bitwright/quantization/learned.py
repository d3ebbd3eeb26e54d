"""A learned pass after rounding: codes, then everything that is not an integer, by the error of the block's output.

It begins where a rounder (GPTQ) ended. First the codes may move: each has a position that starts between it and the
float weight, so that the first iterate is the rounder's own result, and is rounded again at each step (the
straight-through estimator). Then codes stay, and the scales, float zero points, biases and norm weights move. Adam
follows the gradient of the squared difference to the float block's output. The best iterate over all samples is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.models.blocks import linear_weight
from bitwright.quantization.block_loss import BlockLoss
from bitwright.quantization.fake_quant import CodeWeight
from bitwright.quantization.stages import BlockTask, Stage, Tuner
from bitwright.quantization.tuning import (
    FORWARD_AND_BACKWARD,
    Adam,
    TunedBlock,
    draw_batches,
    gradients_enabled,
    learning_rate,
)

__all__ = ["LEARNED", "LearnedOptions", "learn_from_codes"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LearnedOptions:
    """How long and how fast a block learns.

    Attributes:
        code_steps: steps in which codes (and scales) move; 0: codes stay as the rounder left them.
        scale_steps: steps after that in which scales, float zero points, biases and norm weights move.
        batch: samples a step.
        code_lr: the largest step of a position, in codes.
        code_wait: the part of ``code_steps`` before the first position moves.
        lr: the largest step of a scale's multiplier, and of biases and norms in units of their root mean square.
        norms: let biases and norm weights move.
        check_every: steps between two looks at all samples.
    """

    code_steps: int = 100
    scale_steps: int = 60
    batch: int = 8
    code_lr: float = 0.01
    code_wait: float = 0.1
    lr: float = 2e-3
    norms: bool = True
    check_every: int = 20

    def __post_init__(self) -> None:
        _check("code_steps", self.code_steps, self.code_steps >= 0, "a whole number of at least 0")
        _check("scale_steps", self.scale_steps, self.scale_steps >= 0, "a whole number of at least 0")
        _check("batch", self.batch, self.batch >= 1, "a whole number of at least 1")
        _check("code_lr", self.code_lr, 0 < self.code_lr < 1, "a number between 0 and 1")
        _check("code_wait", self.code_wait, 0 <= self.code_wait < 1, "a number from 0 to below 1")
        _check("lr", self.lr, 0 < self.lr < 1, "a number between 0 and 1")
        _check("check_every", self.check_every, self.check_every >= 1, "a whole number of at least 1")


def learn_from_codes(
    task: BlockTask, tensors: Mapping[str, QuantizedTensor], options: LearnedOptions
) -> Mapping[str, QuantizedTensor]:
    """Improve ``tensors`` for the layers of ``task``, and the block's biases and norm weights in place.

    On all samples together the result is never worse than the start.

    Raises:
        BitwrightError: BW401 without calibration.
    """
    if not task.layers:
        return tensors
    if not task.inputs:
        what = f"learning needs calibration samples for {task.name}"
        raise BitwrightError("BW401", what, suggestion="give calibration text, or round to nearest: --algorithm rtn")
    with gradients_enabled():
        loss = BlockLoss(task)
        generator = torch.Generator().manual_seed(task.seed)
        for moving, steps in ((True, options.code_steps), (False, options.scale_steps)):
            if steps:
                tensors = _phase(task, loss, tensors, options, generator, moving=moving, steps=steps)
    return tensors


def _passes(options: LearnedOptions, samples: int) -> float:
    steps = options.code_steps + options.scale_steps
    return steps * (FORWARD_AND_BACKWARD * min(options.batch, samples) + samples / options.check_every)


LEARNED: Stage[Tuner] = Stage("learned", LearnedOptions, learn_from_codes, passes=_passes)


def _phase(
    task: BlockTask,
    loss: BlockLoss,
    tensors: Mapping[str, QuantizedTensor],
    options: LearnedOptions,
    generator: torch.Generator,
    *,
    moving: bool,
    steps: int,
) -> Mapping[str, QuantizedTensor]:
    """Adam on what moves in this phase; the best iterate over all samples, the start among them."""
    weights = {
        name: CodeWeight(tensors[name], linear_weight(layer), moving=moving) for name, layer in task.layers.items()
    }
    block = TunedBlock(task.block, task.layers, weights, loss.dtype, with_vectors=options.norms and not moving)
    try:
        best, least = block.snapshot(), loss.mean(size=options.batch)
        adam, batches = Adam(), draw_batches(range(loss.count), options.batch, generator)
        for step in range(steps):
            loss.backward(next(batches))
            code_rate = options.code_lr * learning_rate(step, steps, wait=options.code_wait)
            adam.begin()
            rates = {"": options.lr * learning_rate(step, steps), "position": code_rate}
            adam.update(block.values, block.gradients(), rates)
            block.refresh()
            if (step + 1) % options.check_every and step + 1 < steps:
                continue
            error = loss.mean(size=options.batch)
            if error < least:
                best, least = block.snapshot(), error
        block.restore(best)
        return {name: weight.tensor() for name, weight in weights.items()}
    finally:
        block.release(keep_vectors=True)


def _check(field: str, value: object, is_valid: bool, accepted: str) -> None:
    if not is_valid:
        raise ArgumentError("BW201", f"learned option {field} is {value!r}", suggestion=accepted)
