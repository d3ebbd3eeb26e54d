"""Options with which every algorithm takes little time in a test."""

from __future__ import annotations

import dataclasses

from bitwright.quantization.algorithms import ALGORITHMS

__all__ = ["few_steps"]


def few_steps(algorithm: str) -> dict[str, int]:
    """Options with which an algorithm that trains takes little time, and what cannot be folded is no notice."""
    fields = {field.name for stage in ALGORITHMS[algorithm].stages for field in dataclasses.fields(stage.options)}
    steps = dict.fromkeys(fields & {"steps", "iters", "code_steps", "scale_steps"}, 2)
    return steps | dict.fromkeys(fields & {"folding"}, False)
