"""Regular expressions that come with a model: compiled only if no text can make them take forever."""

from __future__ import annotations

import re

__all__ = ["compile_pattern"]

MAX_PATTERN = 512
# A repeated group that repeats or branches inside, or many open repeats, can take forever to match.
NESTED_REPEAT = re.compile(r"\((?:[^()\\]|\\.)*(?:[*+|]|\{)(?:[^()\\]|\\.)*\)\s*[*+{]")
OPEN_REPEAT = re.compile(r"(?<!\\)[*+]|\{\d*,\d*\}")
MAX_REPEATS = 6


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """``pattern``, compiled.

    Raises:
        ValueError: saying why it is refused.
    """
    too_complex = len(pattern) > MAX_PATTERN or NESTED_REPEAT.search(pattern) is not None
    if too_complex or len(OPEN_REPEAT.findall(pattern)) > MAX_REPEATS:
        raise ValueError(f"{pattern[:80]!r} is too complex a pattern")
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{pattern[:80]!r} is not a regular expression: {error}") from error
