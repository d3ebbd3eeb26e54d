"""What a comparison found: one row for each model, and what was read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bitwright.evaluation.intervals import Interval

__all__ = ["Comparison", "Row", "TextFacts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextFacts:
    """What was read.

    Attributes:
        source: the file or the name of the data set.
        available: tokens of the text.
        used: tokens that were read; fewer than ``available`` only where fewer were asked for (or a single one is left).
        predicted: tokens that were predicted: all but the first of each window, or all where ``start`` begins it.
        windows: how many windows they are in.
        seqlen: tokens in each window but, perhaps, the last.
        start: the token that begins each window and is none of the text, where the models were trained with one.
    """

    source: str
    available: int
    used: int
    predicted: int
    windows: int
    seqlen: int
    start: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One model. Intervals are 95% (bootstrap over windows), and ``None`` where there is only one window.

    Attributes:
        name: as the caller gave it.
        is_reference: the model that the others are compared with; its own divergence is not measured (``None``).
        size_bytes: weight files, or weights in memory.
        bits_per_weight: over the quantized linear layers, scales included; over all weights if none is quantized.
        bits_per_parameter: over all weights, with embeddings and norms.
        perplexity: over all predicted tokens, each counted once.
        kl_mean, kl_p99: KL(reference || model) over the whole vocabulary, nats per token: mean, 99th percentile.
        top1: share of tokens for which the likeliest token is the reference's.
        probes: share of the embedded questions answered right, by kind; ``None`` if they were not asked.
        tasks: the score of each of lm-eval's tasks; empty if none was asked for.
        seconds: to load and read.
        peak_resident_bytes: the largest resident size of the process up to the end of this row.
    """

    name: str
    is_reference: bool
    size_bytes: int
    bits_per_weight: float
    bits_per_parameter: float
    perplexity: float
    perplexity_ci: Interval | None
    kl_mean: float | None
    kl_mean_ci: Interval | None
    kl_p99: float | None
    top1: float | None
    top1_ci: Interval | None
    probes: Mapping[str, float] | None
    seconds: float
    peak_resident_bytes: int
    tasks: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Several models on one text.

    Attributes:
        rows: the models in the order given, and the reference, if there is one, last.
        reference: its name.
        dtype: of activations and of weights that are not quantized; ``None``: as each model stores them.
        probe_counts: how many questions there are of each kind; empty if they were not asked.
        probes_skipped: why they were not asked, or the empty string.
        notices: what the user should know.
    """

    rows: tuple[Row, ...]
    reference: str | None
    text: TextFacts
    dtype: str | None
    probe_counts: Mapping[str, int] = field(default_factory=dict)
    probes_skipped: str = ""
    notices: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record; numbers that are not finite, which JSON does not have, are ``None``."""
        record: dict[str, Any] = _finite(asdict(self))
        return record


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(name): _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
