"""Confidence intervals of means over tokens, where only windows are independent of each other."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["RESAMPLES", "Interval", "mean_interval"]

Interval = tuple[float, float]
RESAMPLES = 2000
SEED = 0
CELLS = 1 << 22  # indices drawn at a time


def mean_interval(sums: Tensor, counts: Tensor) -> Interval | None:
    """The 95% bootstrap interval of ``sums.sum() / counts.sum()``, windows being drawn with replacement.

    Tokens of one window depend on each other, so that an interval over tokens would be far too narrow. The percentile
    method; the draws are seeded, so that equal measurements have equal intervals.

    Args:
        sums: one total per window, float64 ``[windows]``.
        counts: how many tokens each total is over, ``[windows]``.

    Returns:
        Low and high; ``None`` for fewer than two windows, which say nothing about their spread.
    """
    windows = len(sums)
    if windows < 2:
        return None
    generator = torch.Generator().manual_seed(SEED)
    means = torch.empty(RESAMPLES, dtype=torch.float64)
    step = max(1, CELLS // windows)
    for start in range(0, RESAMPLES, step):
        rows = min(step, RESAMPLES - start)
        drawn = torch.randint(windows, (rows, windows), generator=generator)
        means[start : start + rows] = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high
