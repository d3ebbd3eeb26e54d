"""Plain text: aligned tables, sizes, durations. No width is guessed and nothing is cut off."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["format_duration", "format_number", "format_size", "format_table"]


def format_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Columns side by side, the first ``left`` of them aligned to the left, the others to the right.

    Example:
        >>> print(format_table(["name", "size"], [["a", "10"], ["long name", "9"]]))
        name       size
        ---------  ----
        a            10
        long name     9
    """
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    lines.insert(1, ["-" * width for width in widths])
    return "\n".join(_format_line(line, widths, left) for line in lines)


def _format_line(cells: Sequence[str], widths: Sequence[int], left: int) -> str:
    padded = [
        cell.ljust(width) if column < left else cell.rjust(width)
        for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def format_size(size: float) -> str:
    """Bytes with a decimal unit.

    Example:
        >>> format_size(12_345_678)
        '12.3 MB'
    """
    for unit, step in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= step:
            return f"{size / step:.{1 if size < 1000 * step else 0}f} {unit}"
    return f"{size:.0f} B"


def format_duration(seconds: float) -> str:
    """A duration in its two largest units.

    Example:
        >>> format_duration(7803)
        '2 h 10 m'
    """
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} m"


def format_number(value: float | None, digits: int = 3) -> str:
    """``digits`` significant digits, with an exponent beyond a million or a millionth; a dash if not measured."""
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    exponent = math.floor(math.log10(abs(value))) if value else 0
    if not -6 < exponent < 6:
        return f"{value:.{digits - 1}e}"
    return f"{value:,.{max(0, digits - 1 - exponent)}f}"
