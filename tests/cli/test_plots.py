"""Both pictures put every point where it belongs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from bitwright.cli.plots import Point, draw_png, draw_text

POINTS = [Point(8.0, 1e-5, "w8"), Point(4.0, 1e-3, "w4"), Point(2.0, 1e1, "w2")]


def test_points_are_where_they_belong() -> None:
    lines = draw_text(POINTS, x_title="bits", y_title="KL", width=64, height=13).splitlines()
    assert lines[0].strip() == "KL"
    assert lines[-1].endswith("bits")
    rows = {label: next(line for line in lines if f"o {label}" in line) for label in ("w8", "w4", "w2")}
    assert rows["w8"].startswith("1e-5") and rows["w4"].startswith("1e-3") and rows["w2"].startswith("1e+1")
    left = rows["w8"].index("|") + 1
    columns = {label: line.index("o ") - left for label, line in rows.items()}
    assert columns == {"w8": round(8 / 9 * 63) - 1 + 1, "w4": round(4 / 9 * 63), "w2": round(2 / 9 * 63)}
    assert [lines.index(rows[label]) for label in ("w2", "w4", "w8")] == sorted(map(lines.index, rows.values()))


@pytest.mark.parametrize("y", [0.0, 1e-30, 1.0, 3e5])
def test_extreme_values_are_drawn(y: float) -> None:
    text = draw_text([Point(4.0, y, "only")], x_title="x", y_title="y")
    assert text.count("o only") == 1
    assert max(map(len, text.splitlines())) < 80


def test_a_label_at_the_edge_is_whole() -> None:
    text = draw_text([Point(8.0, 1.0, "a long label indeed")], x_title="x", y_title="y", width=30)
    assert "o a long label indeed" in text


def test_the_picture(tmp_path: Path) -> None:
    assert draw_png(POINTS, tmp_path / "a.png", title="t", x_title="x", y_title="y")
    data = (tmp_path / "a.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n")
    assert len(data) > 5000


def test_without_matplotlib_there_is_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert not draw_png(POINTS, tmp_path / "a.png", title="t", x_title="x", y_title="y")
    assert list(tmp_path.iterdir()) == []
