"""The text of one answer as it grows: whole characters only, and nothing of a text that may turn out to end it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from bitwright.models.prompts import Detokenizer

if TYPE_CHECKING:
    from bitwright.models.hf import Tokenizer

__all__ = ["AnswerText"]


class AnswerText:
    """Pieces of text from tokens.

    Args:
        tokenizer: ``None`` for answers without text.
        prompt: tokens before the answer, on which its first piece depends.
        stops: texts before which the answer ends; the one that begins first counts, of those the longest.
    """

    def __init__(self, tokenizer: Tokenizer | None, prompt: Sequence[int], stops: Sequence[str]) -> None:
        self._detokenizer = None if tokenizer is None else Detokenizer(tokenizer, prompt)
        self._stops = sorted(stops, key=len, reverse=True)
        self._held = ""
        self.stopped_by: str | None = None

    def add(self, token: int) -> str:
        """The text that can be shown once ``token`` is there; ``stopped_by`` tells whether the answer ends with it."""
        return "" if self._detokenizer is None else self._show(self._detokenizer.add(token))

    def finish(self) -> str:
        """What was held back, where no more tokens come."""
        if self._detokenizer is None or self.stopped_by is not None:
            return ""
        shown = self._show(self._detokenizer.finish())
        rest, self._held = self._held, ""
        return shown + rest

    def _show(self, piece: str) -> str:
        text = self._held + piece
        found = [(text.find(stop), stop) for stop in self._stops if stop in text]
        if found:
            at, self.stopped_by = min(found, key=lambda pair: pair[0])
            self._held = ""
            return text[:at]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` could be the beginning of ``stop``."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)
