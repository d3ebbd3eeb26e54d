"""A text's tokens, cut into windows that are read one by one: nothing overlaps, and nothing is dropped unseen."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.models.hf import Tokenizer
from bitwright.quantization.calibration import tokenize

__all__ = ["TokenWindows", "cut_text", "start_token"]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWindows:
    """Consecutive windows of ``seqlen`` tokens; the last may be shorter.

    The first token of each window is read and not predicted: it has nothing before it. Where ``start`` is given, that
    token begins every window, and all tokens of the text are predicted.

    Attributes:
        source: where the text is from.
        windows: int64 ``[length]`` each, of at least two tokens.
        available: how many tokens the text has; more than ``used`` only where fewer were asked for, or where a last
            single token is left over (alone in its window, it could not be predicted).
        start: the token that the model was trained to see first, which is none of the text.
    """

    source: str
    windows: tuple[Tensor, ...]
    seqlen: int
    available: int
    start: int | None = None

    @property
    def used(self) -> int:
        """How many tokens of the text are read."""
        return sum(len(window) for window in self.windows) - (0 if self.start is None else len(self.windows))

    @property
    def predicted(self) -> int:
        return sum(len(window) - 1 for window in self.windows)

    def batches(self, size: int) -> Iterator[list[int]]:
        """The numbers of the windows, ``size`` at a time; windows of one batch are equally long."""
        for _, group in groupby(range(len(self.windows)), key=lambda index: len(self.windows[index])):
            numbers = list(group)
            yield from (numbers[start : start + size] for start in range(0, len(numbers), size))


def start_token(tokenizer: Tokenizer) -> int | None:
    """The token that ``tokenizer`` puts before every text unless told otherwise, as the model saw it in training.

    Without it such a model is measured on what it never met: the first token has a part of its own in its attention.
    """
    text = "a"
    plain, usual = tokenize(tokenizer, text).tolist(), tokenize(tokenizer, text, add_special_tokens=True).tolist()
    has_one_more = len(usual) > len(plain) and usual[1 : 1 + len(plain)] == plain
    return int(usual[0]) if has_one_more and usual[0] in tokenizer.all_special_ids else None


def cut_text(
    ids: Tensor, *, seqlen: int, source: str, max_tokens: int | None = None, start: int | None = None
) -> TokenWindows:
    """Cut ``ids`` (int64 ``[n]``), or the first ``max_tokens`` of them, into windows, each begun with ``start``.

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
    first = torch.tensor([] if start is None else [start], dtype=ids.dtype)
    pieces = [torch.cat([first, piece]) for piece in torch.split(used, seqlen - len(first))]
    windows = tuple(piece for piece in pieces if len(piece) >= 2)
    return TokenWindows(source=source, windows=windows, seqlen=seqlen, available=len(ids), start=start)
