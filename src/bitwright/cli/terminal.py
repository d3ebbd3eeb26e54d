"""Text for a terminal: what comes from a model or a file cannot move the cursor or change colours."""

from __future__ import annotations

import re
import textwrap
from itertools import zip_longest

__all__ = ["printable", "side_by_side"]

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """``text`` with control characters, all but tab and line feed, spelled out.

    Example:
        >>> printable("a\\x1b[31mb")
        'a\\\\x1b[31mb'
    """
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape").decode("ascii"), text)


def side_by_side(left: tuple[str, str], right: tuple[str, str], *, width: int = 100) -> str:
    """Two texts, each with its heading, wrapped into two columns."""
    column = (width - 3) // 2
    sides = [[heading, "-" * column, *_wrap(text, column)] for heading, text in (left, right)]
    return "\n".join(f"{a:<{column}} | {b}".rstrip() for a, b in zip_longest(*sides, fillvalue=""))


def _wrap(text: str, width: int) -> list[str]:
    return [line for paragraph in text.strip().splitlines() for line in textwrap.wrap(paragraph, width) or [""]]
