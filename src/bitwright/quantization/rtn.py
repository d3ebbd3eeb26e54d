"""Round to nearest: fit a grid to each group of weights and take the nearest code. Needs no data."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bitwright.core.grid import FitOptions, Range
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme
from bitwright.quantization.stages import Rounder, Stage
from bitwright.quantization.statistics import SiteStatistics

__all__ = ["RTN", "RtnOptions", "refuse_range", "round_to_nearest"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RtnOptions:
    """How ranges are chosen.

    Attributes:
        range: symmetric schemes only. ``restricted``: largest weight on the largest code; ``full``: on the lowest code,
            its sign in the scale; ``centred``: half a step beyond, as compressed-tensors presets; ``either``: of the
            first two the better for each group.
        search: try shrunk ranges and keep, per group, the one of least squared error.
    """

    range: Range = "restricted"
    search: bool = False

    def __post_init__(self) -> None:
        FitOptions(symmetric_range=self.range, search=self.search)

    @property
    def fit(self) -> FitOptions:
        return FitOptions(symmetric_range=self.range, search=self.search)


def round_to_nearest(
    weight: Tensor, statistics: SiteStatistics | None, scheme: QuantScheme, options: RtnOptions
) -> QuantizedTensor:
    """Quantize ``weight`` (``[out, in]``, any float dtype); ``statistics`` are not looked at."""
    return QuantizedTensor.quantize(weight, scheme, options.fit)


def refuse_range(scheme: QuantScheme, options: RtnOptions) -> str | None:
    """Why ``scheme`` cannot take the range of ``options``, or ``None``."""
    return options.fit.refuse(scheme)


RTN: Stage[Rounder] = Stage("rtn", RtnOptions, round_to_nearest, refuse_range)
