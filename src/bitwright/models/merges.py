"""The merges of a vocabulary for byte-pair encoding, where a file has only its tokens in their order."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import AnyStr

__all__ = ["find_merges"]

MOST_JOINED = 1 << 25  # letters, or bytes, of all merges together, several times those of a real vocabulary


def find_merges(tokens: Iterable[AnyStr], places: Mapping[AnyStr, int]) -> list[tuple[AnyStr, AnyStr]]:
    """Every two tokens with a place that make one of ``tokens``: in their order, then by the places of the two.

    Raises:
        ValueError: the tokens are made of each other in so many ways that the list would not fit the memory.
    """
    found, joined = list[tuple[AnyStr, AnyStr]](), 0
    for token in tokens:
        cuts = ((token[:place], token[place:]) for place in range(1, len(token)))
        pairs = [(left, right) for left, right in cuts if left in places and right in places]
        joined += len(token) * len(pairs)
        if joined > MOST_JOINED:
            raise ValueError("its tokens are made of each other in too many ways")
        found += sorted(pairs, key=lambda pair: (places[pair[0]], places[pair[1]]))
    return found
