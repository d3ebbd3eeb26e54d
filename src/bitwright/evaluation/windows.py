"""A text's tokens, cut into windows that are read one by one: nothing overlaps, and nothing is dropped unseen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError, BitwrightError

__all__ = ["TokenWindows", "cut_text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWindows:
    """Consecutive windows of ``seqlen`` tokens; the last may be shorter.

    The first token of each window is read and not predicted: it has nothing before it.

    Attributes:
        source: where the text is from.
        windows: int64 ``[length]`` each, of at least two tokens.
        available: how many tokens the text has; more than ``used`` only where fewer were asked for, or where a last
            single token is left over (alone in its window, it could not be predicted).
    """

    source: str
    windows: tuple[Tensor, ...]
    seqlen: int
    available: int

    @property
    def used(self) -> int:
        return sum(len(window) for window in self.windows)

    @property
    def predicted(self) -> int:
        return self.used - len(self.windows)

    def batches(self, size: int) -> Iterator[list[int]]:
        """The numbers of the windows, ``size`` at a time; windows of one batch are equally long."""
        for _, group in groupby(range(len(self.windows)), key=lambda index: len(self.windows[index])):
            numbers = list(group)
            yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def cut_text(ids: Tensor, *, seqlen: int, source: str, max_tokens: int | None = None) -> TokenWindows:
    """Cut ``ids`` (int64 ``[n]``), or the first ``max_tokens`` of them, into windows.

    Raises:
        BitwrightError: BW201 for impossible numbers, BW401 if there are fewer than two tokens.
    """
    for field, value in (("seqlen", seqlen), ("max_tokens", max_tokens)):
        if value is not None and (type(value) is not int or value < 2):
            raise ArgumentError("BW201", f"{field} is {value!r}", suggestion="a whole number, at least 2")
    used = ids[:max_tokens]
    if len(used) < 2:
        raise BitwrightError(
            "BW401",
            f"{source} has {len(used)} tokens, and the shortest text that can be measured has 2",
            why=f"window length asked: {seqlen}; windows found: 0",
            suggestion="give a longer text",
        )
    pieces = torch.split(used, seqlen)
    windows = tuple(piece for piece in pieces if len(piece) >= 2)
    return TokenWindows(source=source, windows=windows, seqlen=seqlen, available=len(ids))
