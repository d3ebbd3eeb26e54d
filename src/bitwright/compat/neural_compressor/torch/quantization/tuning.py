"""Trying configurations until one is good enough."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from bitwright.compat.neural_compressor.torch.quantization.config import WeightOnlyConfig
from bitwright.compat.neural_compressor.torch.quantization.quantize import Configuration, quantize
from bitwright.core.errors import ArgumentError

__all__ = ["TuningConfig", "autotune"]


@dataclass
class TuningConfig:
    """What :func:`autotune` tries.

    Attributes:
        config_set: the configurations, in the order in which they are tried.
        tolerable_loss: the share of the float model's score that may be lost.
        max_trials: at most so many are tried.

    Raises:
        ArgumentError: BW201 (a ``ValueError``) naming the field.
    """

    config_set: Sequence[Configuration] = field(default_factory=tuple)
    tolerable_loss: float = 0.01
    max_trials: int = 100

    def __post_init__(self) -> None:
        if isinstance(self.config_set, WeightOnlyConfig):
            self.config_set = (self.config_set,)
        if not self.config_set:
            message = "TuningConfig: config_set is empty"
            raise ArgumentError("BW201", message, suggestion="a list of configurations such as RTNConfig()")
        if type(self.tolerable_loss) not in (int, float) or not 0 <= self.tolerable_loss <= 1:
            message = f"TuningConfig: tolerable_loss is {self.tolerable_loss!r}"
            raise ArgumentError("BW201", message, suggestion="accepted: a number from 0 to 1")
        if type(self.max_trials) is not int or self.max_trials < 1:
            message = f"TuningConfig: max_trials is {self.max_trials!r}"
            raise ArgumentError("BW201", message, suggestion="accepted: a whole number: 1 or more")


def autotune(
    model: nn.Module,
    tune_config: TuningConfig,
    eval_fn: Callable[..., float],
    eval_args: Any = None,
    run_fn: Callable[..., object] | None = None,
    run_args: Any = None,
    example_inputs: Any = None,
) -> nn.Module:
    """The first quantized model whose score reaches ``baseline * (1 - tolerable_loss)``, else the best of all.

    ``eval_fn(model, *eval_args)`` gives a score, more being better; it is first asked for the baseline, that of
    ``model``, which stays as it is. One quantized model is held at a time: if the best is not the last that was tried,
    it is made once more.
    """
    arguments = () if eval_args is None else eval_args if isinstance(eval_args, tuple | list) else (eval_args,)

    def make(config: Configuration) -> nn.Module:
        return quantize(model, config, run_fn, run_args, inplace=False, example_inputs=example_inputs)

    enough = float(eval_fn(model, *arguments)) * (1 - tune_config.tolerable_loss)
    best: tuple[float, int] = (float("-inf"), 0)
    configs = list(tune_config.config_set)[: tune_config.max_trials]
    for trial, config in enumerate(configs):
        made = make(config)
        score = float(eval_fn(made, *arguments))
        if score >= enough:
            return made
        if trial == 0 or score > best[0]:
            best = (score, trial)
    return made if best[1] == len(configs) - 1 else make(configs[best[1]])
