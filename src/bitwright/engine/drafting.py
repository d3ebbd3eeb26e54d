"""Guesses of what comes next, from the text itself: what followed when the last few tokens stood there before.

Prompt lookup (Saxena 2023). A guess costs little when it is wrong, and the answer is the same either way: every token
is chosen from the logits after the tokens before it, which do not depend on how many tokens a step computes.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["look_up"]

LONGEST, SHORTEST = 4, 2  # how many last tokens must have stood there before
FARTHEST = 4096  # how far back is looked


def look_up(tokens: Sequence[int], most: int) -> list[int]:
    """At most ``most`` tokens: what followed the longest known ending where it stood last; none if it never did."""
    recent = list(tokens[-FARTHEST:])
    for length in range(LONGEST, SHORTEST - 1, -1):
        ending = recent[-length:]
        for start in range(len(recent) - length - 1, -1, -1):
            if recent[start] == ending[0] and recent[start : start + length] == ending:
                return recent[start + length : start + length + most]
    return []
