"""Points as a picture: in plain text always, and as a PNG where matplotlib is installed."""

from __future__ import annotations

import importlib.util
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Point", "draw_png", "draw_text"]

LEAST = 1e-9  # what a zero is drawn as on a logarithmic axis


@dataclass(frozen=True, slots=True)
class Point:
    """A labelled point; ``y`` is drawn on a logarithmic axis."""

    x: float
    y: float
    label: str


def draw_text(points: Sequence[Point], *, x_title: str, y_title: str, width: int = 64, height: int = 14) -> str:
    """A plot of ``width`` x ``height`` characters inside its axes, the y axis marked at powers of ten."""
    logs = [math.log10(max(point.y, LEAST)) for point in points]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    high += low == high
    right = math.ceil(max(point.x for point in points)) + 1
    cells = [[" "] * width for _ in range(height)]
    marks: dict[int, str] = {}
    for power in range(low, high + 1):
        row = _row(power, low, high, height)
        marks[row] = f"1e{power:+d}"
        cells[row] = ["."] * width
    for point, log in zip(points, logs, strict=True):
        column = min(width - 1, round(point.x / right * (width - 1)))
        _write(cells[_row(log, low, high, height)], column, f"o {point.label}")
    margin = max(map(len, marks.values()))
    lines = [f"{'':>{margin}} {y_title}"]
    lines += [f"{marks.get(row, ''):>{margin}} |{''.join(cells[row]).rstrip()}" for row in range(height)]
    axis, ticks = ["-"] * width, [" "] * width
    for tick in range(right + 1):
        column = round(tick / right * (width - 1))
        axis[column] = "+"
        _write(ticks, column, str(tick))
    lines += [f"{'':>{margin}} +{''.join(axis)}", f"{'':>{margin}}  {''.join(ticks).rstrip()}  {x_title}"]
    return "\n".join(lines)


def _row(log: float, low: int, high: int, height: int) -> int:
    """The row of a power of ten; row 0 is the top."""
    return round((high - log) / (high - low) * (height - 1))


def _write(cells: list[str], column: int, text: str) -> None:
    """Put ``text`` at ``column``, moved left if it would not fit."""
    start = max(0, min(column, len(cells) - len(text)))
    cells[start : start + len(text)] = text


def draw_png(points: Sequence[Point], path: Path, *, title: str, x_title: str, y_title: str) -> bool:
    """Write the same plot as a picture; ``False`` (and no file) if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from bitwright.formats.storage import write_file

    figure = Figure(figsize=(7, 4.5), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    ordered = sorted(points, key=lambda point: point.x)
    axes.semilogy([point.x for point in ordered], [max(point.y, LEAST) for point in ordered], marker="o")
    for point in ordered:
        place = (point.x, max(point.y, LEAST))
        axes.annotate(point.label, place, xytext=(6, 6), textcoords="offset points")
    axes.set(title=title, xlabel=x_title, ylabel=y_title)
    axes.grid(alpha=0.3)
    axes.margins(y=0.15)
    axes.set_xlim(left=0, right=max(point.x for point in points) * 1.15)
    image = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(image, format="png")
    write_file(path, [image.getvalue()])
    return True
