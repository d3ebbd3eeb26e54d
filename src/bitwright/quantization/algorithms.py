"""The table of algorithms. A new one is a file, a row here and a test."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme, QuantScheme
from bitwright.quantization.rtn import RtnOptions, round_to_nearest
from bitwright.quantization.statistics import SiteStatistics

__all__ = ["ALGORITHMS", "Algorithm", "BlockTask", "get_algorithm", "parse_options"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTask:
    """One block on the bench: what equalizers and tuners work on.

    Attributes:
        name: of the block in the model (``model.layers.3``).
        block: the module with its float weights loaded.
        linears: the layers to quantize by full name, and their schemes.
        statistics: of each layer's input site; empty without calibration.
        inputs: the block's calibration inputs, one tensor a sample; empty without calibration.
        run: computes the block on one of its inputs, by sample number, as the block is now.
        seed: of this block alone, from the run's seed and the block's name.
    """

    name: str
    block: nn.Module
    linears: Mapping[str, LayerScheme]
    statistics: Mapping[str, SiteStatistics]
    inputs: tuple[Tensor, ...]
    run: Callable[[int], Tensor]
    seed: int


Rounder = Callable[[Tensor, SiteStatistics | None, QuantScheme, Any], QuantizedTensor]
Equalizer = Callable[[BlockTask, Any], None]
Tuner = Callable[[BlockTask, Mapping[str, QuantizedTensor], Any], Mapping[str, QuantizedTensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """What happens to a block between loading and writing: equalize, then round, then tune.

    Attributes:
        options: frozen dataclass of the algorithm's own options.
        round: weight ``[out, in]``, its site's statistics, scheme, options -> quantized tensor. Pure.
        equalize: changes the block's float weights so that its float output stays and rounding hurts less.
        tune: improves the rounded tensors with the whole block in view.
        calibrated: whether calibration text is needed.
        with_gram: whether ``sum(x xT)`` of each input site is needed.
    """

    options: type
    round: Rounder
    equalize: Equalizer | None = None
    tune: Tuner | None = None
    calibrated: bool = False
    with_gram: bool = False


ALGORITHMS: dict[str, Algorithm] = {
    "rtn": Algorithm(options=RtnOptions, round=round_to_nearest),
}


def get_algorithm(name: str) -> Algorithm:
    """Look an algorithm up.

    Raises:
        BitwrightError: BW201 listing the known names.
    """
    if name not in ALGORITHMS:
        raise BitwrightError("BW201", f"unknown algorithm {name!r}", suggestion="one of " + ", ".join(ALGORITHMS))
    return ALGORITHMS[name]


def parse_options(name: str, values: Mapping[str, Any]) -> Any:
    """The options record of algorithm ``name`` from ``values``.

    Raises:
        BitwrightError: BW201 naming the unknown option, or the one whose value has the wrong type or range.
    """
    options = get_algorithm(name).options
    fields = {field.name for field in dataclasses.fields(options)}
    unknown = sorted(set(values) - fields)
    if unknown:
        known = ", ".join(sorted(fields))
        raise BitwrightError("BW201", f"{name} has no option {unknown[0]!r}", suggestion=f"its options: {known}")
    hints = typing.get_type_hints(options)
    for field, value in values.items():
        if hints[field] in (bool, int, float) and type(value) is not hints[field]:
            raise BitwrightError(
                "BW201", f"{name} option {field} is {value!r}", suggestion=f"a {hints[field].__name__}"
            )
    return options(**values)
