"""Guesses of what comes next, from the text itself: what followed when the last few tokens stood there before.

Prompt lookup (Saxena 2023). A guess costs little when it is wrong, and the answer is the same either way: every token
is chosen from the logits after the tokens before it, which do not depend on how many tokens a step computes.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

__all__ = ["look_up"]

LONGEST, SHORTEST = 4, 2  # how many last tokens must have stood there before
FARTHEST = 4096  # how far back is looked
WIDTH = 8  # bytes of a token in an array


def look_up(tokens: Sequence[int], most: int) -> list[int]:
    """At most ``most`` tokens: what followed the longest known ending where it stood last; none if it never did."""
    recent = tokens[-FARTHEST:]
    content = array("q", recent).tobytes()  # in which C looks for a pattern
    for length in range(min(LONGEST, len(recent) - 1), SHORTEST - 1, -1):
        ending, end = content[-length * WIDTH :], len(content) - WIDTH
        while (at := content.rfind(ending, 0, end)) >= 0:
            if at % WIDTH == 0:
                start = at // WIDTH + length
                return list(recent[start : start + most])
            end = at + len(ending) - 1
    return []
