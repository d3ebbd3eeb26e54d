"""One model read over all windows of a text: losses, and, beside a reference, divergence and agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitwright.evaluation.divergence import agreement, divergence
from bitwright.evaluation.intervals import Interval, mean_interval
from bitwright.evaluation.perplexity import log_probabilities, perplexity_of, read_windows, token_losses
from bitwright.evaluation.windows import TokenWindows

__all__ = ["LogitSource", "Measurement", "ModelLogits", "measure"]

CELLS = 1 << 21  # logits worked on at a time in float64
# The logits of a batch of windows by their numbers, [windows, length - 1, vocabulary].
LogitSource = Callable[[Sequence[int]], Tensor]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Totals of each window (float64 or int64 ``[windows]``) and the divergence of every token (float64 ``[tokens]``).

    ``divergences`` and ``agreements`` are ``None`` without a reference.
    """

    counts: Tensor
    losses: Tensor
    divergences: Tensor | None
    agreements: Tensor | None

    @property
    def tokens(self) -> int:
        return int(self.counts.sum())

    def perplexity(self) -> tuple[float, Interval | None]:
        """Over all tokens, each counted once; and its 95% interval."""
        interval = mean_interval(self.losses, self.counts)
        mean = float(self.losses.sum() / self.counts.sum())
        return perplexity_of(mean), interval and (perplexity_of(interval[0]), perplexity_of(interval[1]))

    def mean_divergence(self) -> tuple[float, Interval | None] | None:
        if self.divergences is None:
            return None
        sums = torch.stack([part.sum() for part in torch.split(self.divergences, self.counts.tolist())])
        return float(sums.sum() / self.counts.sum()), mean_interval(sums, self.counts)

    def high_divergence(self) -> float | None:
        """The 99th percentile over all tokens: the least value that is not exceeded by 99 of 100."""
        if self.divergences is None:
            return None
        rank = math.ceil(0.99 * len(self.divergences))
        return float(self.divergences.kthvalue(rank).values)

    def top1(self) -> tuple[float, Interval | None] | None:
        if self.agreements is None:
            return None
        mean = float(self.agreements.sum() / self.counts.sum())
        return mean, mean_interval(self.agreements.to(torch.float64), self.counts)


@dataclass(frozen=True, slots=True)
class ModelLogits:
    """The logits of a model in memory, computed anew at each call (a :data:`LogitSource`)."""

    model: nn.Module
    text: TokenWindows

    def __call__(self, numbers: Sequence[int]) -> Tensor:
        return read_windows(self.model, [self.text.windows[number] for number in numbers])


def measure(
    source: LogitSource,
    text: TokenWindows,
    *,
    batch: int,
    reference: LogitSource | None = None,
    on_window: Callable[[int, int], None] = lambda done, total: None,
) -> Measurement:
    """Read every window of ``text``, ``batch`` at a time.

    Raises:
        BitwrightError: BW601 if the model gives NaN.
    """
    counts, losses, divergences, agreements = [], [], [], []
    for numbers in text.batches(batch):
        logits = source(numbers)
        beside = None if reference is None else reference(numbers)
        for row, number in enumerate(numbers):
            targets = text.windows[number][1:].to(logits.device)
            kept = _measure_window(logits[row], targets, None if beside is None else beside[row])
            counts.append(len(targets))
            losses.append(kept[0].sum())
            divergences.append(kept[1])
            agreements.append(kept[2].sum())
        on_window(len(counts), len(text.windows))
    has_reference = reference is not None
    return Measurement(
        counts=torch.tensor(counts),
        losses=torch.stack(losses).cpu(),
        divergences=torch.cat(divergences).cpu() if has_reference else None,
        agreements=torch.stack(agreements).cpu() if has_reference else None,
    )


def _measure_window(logits: Tensor, targets: Tensor, reference: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, divergences and agreements of the tokens of one window (the last two empty without a reference)."""
    rows = max(1, CELLS // logits.shape[-1])
    losses, divergences, agreements = [], [], []
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        found = log_probabilities(logits[part])
        losses.append(token_losses(found, targets[part]))
        if reference is not None:
            wanted = log_probabilities(reference[part].to(logits.device))
            divergences.append(divergence(wanted, found))
            agreements.append(agreement(wanted, found))
    empty = torch.empty(0)
    return torch.cat(losses), torch.cat(divergences or [empty]), torch.cat(agreements or [empty])
