"""Tables, sizes and durations read as they should."""

from __future__ import annotations

import pytest

from bitwright.cli.tables import format_duration, format_number, format_size, format_table


def test_columns_are_aligned() -> None:
    table = format_table(["name", "size"], [["a", "10"], ["long name", "9"]])
    assert table.splitlines() == ["name       size", "---------  ----", "a            10", "long name     9"]


def test_columns_on_the_left_have_no_trailing_space() -> None:
    assert format_table(["a", "b"], [["x", ""]], left=2).splitlines() == ["a  b", "-  -", "x"]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (12_345_678, "12.3 MB"),
        (3_087_467_520, "3.1 GB"),
        (5e15, "5000 TB"),
    ],
)
def test_sizes(size: float, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (9.96, "10 s"), (59.6, "1 m 0 s"), (125, "2 m 5 s"), (7803, "2 h 10 m")],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (0.0, "0.00"),
        (1.5, "1.50"),
        (99.94, "99.9"),
        (12345.6, "12,346"),
        (3.2e9, "3.20e+09"),
        (0.00123, "0.00123"),
        (0.0000123, "0.0000123"),
        (1.23e-7, "1.23e-07"),
        (-0.5, "-0.500"),
    ],
)
def test_numbers(value: float | None, text: str) -> None:
    assert format_number(value) == text
