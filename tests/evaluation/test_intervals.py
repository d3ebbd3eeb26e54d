"""Intervals: they contain what they should, as often as they should, and are the same each time."""

from __future__ import annotations

import pytest
import torch

from bitwright.evaluation.intervals import mean_interval


def test_one_window_has_no_interval() -> None:
    assert mean_interval(torch.tensor([3.0], dtype=torch.float64), torch.tensor([10])) is None


def test_equal_windows_have_a_point() -> None:
    interval = mean_interval(torch.full((5,), 20.0, dtype=torch.float64), torch.full((5,), 10))
    assert interval == (2.0, 2.0)


def test_windows_are_weighted_by_their_tokens() -> None:
    """A short window far from the others hardly moves the mean of tokens."""
    counts = torch.tensor([1000] * 9 + [1])
    sums = torch.tensor([1000.0] * 9 + [50.0], dtype=torch.float64)
    low, high = mean_interval(sums, counts) or (0.0, 0.0)
    assert 1.0 <= low <= high < 1.03


def test_equal_measurements_have_equal_intervals() -> None:
    sums, counts = torch.rand(40, dtype=torch.float64), torch.full((40,), 7)
    torch.manual_seed(1)
    first = mean_interval(sums, counts)
    torch.manual_seed(2)
    assert mean_interval(sums, counts) == first


def test_many_windows_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    sums, counts = torch.rand(50, dtype=torch.float64), torch.full((50,), 1)
    whole = mean_interval(sums, counts)
    monkeypatch.setattr("bitwright.evaluation.intervals.CELLS", 50 * 300)
    assert mean_interval(sums, counts) == pytest.approx(whole, rel=0.02)


def test_nine_and_a_half_of_ten_intervals_contain_the_mean() -> None:
    """Tokens of a window share an offset: an interval over tokens would hold the mean far less often."""
    generator = torch.Generator().manual_seed(0)
    hits, naive = 0, 0
    for _ in range(300):
        offsets = torch.randn(60, 1, generator=generator, dtype=torch.float64)
        tokens = offsets + 0.5 * torch.randn(60, 32, generator=generator, dtype=torch.float64)
        low, high = mean_interval(tokens.sum(1), torch.full((60,), 32)) or (0.0, 0.0)
        hits += low <= 0.0 <= high
        error = 1.96 * float(tokens.std()) / tokens.numel() ** 0.5
        naive += abs(float(tokens.mean())) <= error
    assert 0.90 <= hits / 300 <= 0.985
    assert naive / 300 < 0.5
