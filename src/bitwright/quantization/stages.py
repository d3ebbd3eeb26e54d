"""What an algorithm is made of: stages that work on one block, and the record that they work on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme, QuantScheme
from bitwright.quantization.statistics import SiteStatistics

__all__ = ["Algorithm", "BlockTask", "Equalizer", "Finisher", "Rotator", "Rounded", "Rounder", "Stage", "Tuner"]


class _RunOn(Protocol):
    def __call__(self, hidden: Tensor, sample: int) -> Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTask:
    """One block on the bench: what equalizers and tuners work on.

    Attributes:
        name: of the block in the model (``model.layers.3``).
        block: the module with its float weights loaded (a ``ModuleList`` where several blocks are tuned together).
        layers: the float layers that the algorithm is responsible for, by full name.
        linears: the schemes of the same layers.
        sites: those of them that read the very same input, together, in the order in which they run.
        statistics: of each layer's input site; empty without calibration, and without layers that saw no token.
        inputs: the block's calibration inputs (``[1, tokens, width]``), one tensor a sample; empty without calibration.
        reference_inputs: what the block gets in the float model; the same as ``inputs`` unless the algorithm asks for
            a float flow.
        run: computes the block on one of its inputs, by sample number, as the block is now.
        run_on: computes the block on other hidden states, with the masks and positions of that sample.
        seed: of this block alone, from the run's seed and the block's name.
        alike: all samples have one length, mask and set of positions, so that any of them may be run as one batch
            (``run_on(torch.cat([...]), sample)``).
    """

    name: str
    block: nn.Module
    layers: Mapping[str, nn.Module]
    linears: Mapping[str, LayerScheme]
    sites: tuple[tuple[str, ...], ...]
    statistics: Mapping[str, SiteStatistics]
    inputs: tuple[Tensor, ...]
    reference_inputs: tuple[Tensor, ...]
    run: Callable[[int], Tensor]
    run_on: _RunOn
    seed: int
    alike: bool = False


@dataclass(frozen=True, slots=True)
class Rounded:
    """A rounded weight, and what the report should say of how it went (``{"damp": 0.1}``)."""

    tensor: QuantizedTensor
    notes: Mapping[str, Any] = field(default_factory=dict)


Rounder = Callable[[Tensor, SiteStatistics | None, QuantScheme, Any], QuantizedTensor | Rounded]
Equalizer = Callable[[BlockTask, Any], Mapping[str, Tensor]]
Tuner = Callable[[BlockTask, Mapping[str, QuantizedTensor], Any], Mapping[str, QuantizedTensor]]
Finisher = Callable[..., Any]  # a task for the whole quantized model, options, seed, state, on_check -> its updates
Rotator = Callable[[nn.Module, Any, int], None]  # rotates a module in memory: options, seed
Work = TypeVar("Work")


def _no_training(options: Any, samples: int) -> float:
    return 0.0


def _accept(scheme: QuantScheme, options: Any) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Stage(Generic[Work]):
    """One step of an algorithm: its name, the frozen dataclass of its options, and what it does.

    ``refuse`` says, before any work, why it cannot be used for a scheme, or ``None``. ``passes``: about how many
    forward passes of one sample through the blocks its training is worth, by its options and the number of samples.
    """

    name: str
    options: type
    run: Work
    refuse: Callable[[QuantScheme, Any], str | None] = _accept
    passes: Callable[[Any, int], float] = _no_training


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """What happens to a block between loading and writing: equalize, then round, then tune.

    Attributes:
        round: weight ``[out, in]``, its site's statistics, scheme, options -> quantized tensor. Pure. If its options
            have a true ``true_sequential``, sites are rounded one after the other, each seeing rounded predecessors.
        equalize: change the block's float weights so that its float output stays and rounding hurts less. What cannot
            be folded into the block is returned: by layer, the vector ``[in]`` that multiplies its input from then on.
        tune: improve the rounded tensors with the whole block in view; the block's other parameters may change too.
        finish: improve the whole quantized model when all blocks are done, as :func:`.logits.tune_logits` does.
        rotate: rotate the whole float model before anything else; sources do that as they load it.
        calibrated: whether calibration text is needed.
        with_gram: whether ``sum(x xT)`` of each input site is needed.
        with_float_flow: whether ``BlockTask.reference_inputs`` are those of the float model.
    """

    round: Stage[Rounder]
    equalize: tuple[Stage[Equalizer], ...] = ()
    tune: tuple[Stage[Tuner], ...] = ()
    finish: Stage[Finisher] | None = None
    rotate: Stage[Rotator] | None = None
    calibrated: bool = False
    with_gram: bool = False
    with_float_flow: bool = False

    @property
    def stages(self) -> tuple[Stage[Any], ...]:
        first = () if self.rotate is None else (self.rotate,)
        last = () if self.finish is None else (self.finish,)
        return (*first, *self.equalize, self.round, *self.tune, *last)
