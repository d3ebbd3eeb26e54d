"""The best of several rounders for each layer, by the error that counts: that of the layer's output.

No rounder wins everywhere. A range search weighted by the inputs' power cuts the loss of a sensitive model by half and
costs on a forgiving one; ordering columns helps or hurts by layer. All candidates are made, and the one with the least
``tr(D G DT)`` is kept, where ``D`` is the change of the weight and ``G = sum(x xT)`` over the calibration tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme
from bitwright.quantization.gptq import GptqOptions, round_by_error_feedback
from bitwright.quantization.rtn import RtnOptions, round_to_nearest
from bitwright.quantization.stages import Rounded, Rounder, Stage
from bitwright.quantization.statistics import SiteStatistics

__all__ = ["CANDIDATES", "CHOICE", "ChoiceOptions", "choose_rounder", "output_error"]

_Candidate = Callable[[Tensor, SiteStatistics | None, QuantScheme, float], QuantizedTensor | Rounded]


def _gptq(**fixed: bool | str) -> _Candidate:
    def run(weight: Tensor, statistics: SiteStatistics | None, scheme: QuantScheme, damp: float) -> Rounded:
        return round_by_error_feedback(weight, statistics, scheme, GptqOptions(damp=damp, **fixed))  # type: ignore[arg-type]

    return run


def _nearest(weight: Tensor, statistics: SiteStatistics | None, scheme: QuantScheme, _damp: float) -> QuantizedTensor:
    return round_to_nearest(weight, statistics, scheme, RtnOptions())


# In the order in which the first of equally good ones wins. Groups stay runs of columns in all of them, so that every
# format can store the winner.
CANDIDATES: dict[str, _Candidate] = {
    "rtn": _nearest,
    "gptq": _gptq(act_order=False),
    "gptq-search": _gptq(act_order=False, search="importance"),
    "gptq-ordered": _gptq(act_order=True),
    "gptq-ordered-search": _gptq(act_order=True, search="importance"),
    "gptq-aware-search": _gptq(group_aware=True, search="importance"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceOptions:
    """What is tried.

    Attributes:
        candidates: names of ``CANDIDATES``, with commas between them; ``all``: every one.
        damp: of the candidates that need it, as in :class:`bitwright.quantization.gptq.GptqOptions`.
        true_sequential: round the sites of a block one after the other, each on inputs made by rounded predecessors.
    """

    candidates: str = "all"
    damp: float = 0.01
    true_sequential: bool = False

    def __post_init__(self) -> None:
        GptqOptions(damp=self.damp)
        unknown = [name for name in self.names if name not in CANDIDATES]
        if unknown or not self.names:
            what = f"choice option candidates is {self.candidates!r}"
            raise ArgumentError("BW201", what, suggestion=f"all, or some of {','.join(CANDIDATES)}")

    @property
    def names(self) -> tuple[str, ...]:
        """The candidates' names."""
        return tuple(CANDIDATES) if self.candidates == "all" else tuple(self.candidates.split(","))


def choose_rounder(
    weight: Tensor, statistics: SiteStatistics | None, scheme: QuantScheme, options: ChoiceOptions
) -> Rounded:
    """Quantize ``weight`` (``[out, in]``, any float dtype) by the candidate of least output error.

    The notes name it (``rounder``) and how much larger the error of rounding to nearest is (``gain``).

    Raises:
        BitwrightError: BW401 without calibration tokens; BW602 for weights that are not finite.
    """
    if statistics is None or not statistics.tokens or statistics.gram is None:
        what = "choosing by output error has no calibration tokens for this layer"
        raise BitwrightError("BW401", what, suggestion="give calibration text, or round to nearest: --algorithm rtn")
    best: tuple[float, str, Rounded] | None = None
    nearest_error = 0.0
    for name in options.names:
        made = CANDIDATES[name](weight, statistics, scheme, options.damp)
        rounded = made if isinstance(made, Rounded) else Rounded(made)
        error = output_error(weight, rounded.tensor, statistics)
        nearest_error = error if name == "rtn" else nearest_error
        if best is None or error < best[0]:
            best = (error, name, rounded)
    assert best is not None
    notes = {**best[2].notes, "rounder": best[1]}
    if nearest_error and best[0]:
        notes["gain"] = round(nearest_error / best[0], 3)
    return Rounded(best[2].tensor, notes)


CHOICE: Stage[Rounder] = Stage("choice", ChoiceOptions, choose_rounder)


def output_error(weight: Tensor, tensor: QuantizedTensor, statistics: SiteStatistics) -> float:
    """The squared error of the layer's output, summed over the calibration tokens: ``tr(D G DT)``."""
    assert statistics.gram is not None
    change = weight.detach().to(torch.float32) - tensor.dequantize()
    return float((change @ statistics.gram).mul_(change).sum(dtype=torch.float64))
