"""A conversation with a model that keeps its cache of keys and values from turn to turn."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile

from bitwright.core.errors import ArgumentError
from bitwright.core.kv_scheme import KVScheme
from bitwright.models.generation import Sampling, stream_text
from bitwright.models.hf import PreTrainedModel, Tokenizer
from bitwright.models.kv_cache import QuantizedCache
from bitwright.models.kv_trial import safe_scheme
from bitwright.models.prompts import encode_messages

__all__ = ["Conversation", "Turn"]

# For models that were taught no roles: what was said, line after line.
PLAIN = "{% for message in messages %}{{ message.content }}{{ '\\n' }}{% endfor %}"


@dataclass(frozen=True, slots=True)
class Turn:
    """What one answer took: tokens read anew, tokens that the cache still had, tokens written, seconds."""

    read: int
    kept: int
    written: int
    seconds: float
    cache_bytes: int

    @property
    def speed(self) -> float:
        """Tokens written a second."""
        return self.written / self.seconds if self.seconds > 0 else 0.0


class Conversation:
    """Messages so far, and how the next answer is made.

    ``scheme`` is how keys and values are stored, made safe as ``kv_safety`` says (see :class:`QuantizedCache`).

    Raises:
        BitwrightError: whatever :class:`QuantizedCache` raises for the scheme.

    ``sampling`` and ``max_tokens`` may be replaced between turns; ``turns`` tells what the answers took.

    Example:
        >>> conversation = Conversation(model, tokenizer, parse_kv("int8"))
        >>> "".join(conversation.answer("Once upon a time"))
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: Tokenizer,
        scheme: KVScheme,
        *,
        system: str | None = None,
        kv_safety: str = "warn",
    ) -> None:
        self.model, self.tokenizer, self.system = model, tokenizer, system
        self.scheme = safe_scheme(model, scheme, kv_safety, tokenizer=tokenizer)
        self.sampling, self.max_tokens = Sampling(), None
        self.messages: list[tuple[str, str]] = []
        self.turns: list[Turn] = []
        self._cache: QuantizedCache | None = self._new_cache()  # says at once if the scheme cannot be
        self._known: list[int] = []  # the tokens that the cache begins with

    max_tokens: int | None

    @property
    def cache_bytes(self) -> int:
        return 0 if self._cache is None else self._cache.nbytes

    def forget(self) -> None:
        """Begin anew, with the same system message."""
        self.messages.clear()
        self._cache, self._known = None, []

    def encode(self, question: str) -> list[int]:
        """The tokens that the model reads next."""
        first = [] if self.system is None else [("system", self.system)]
        template = None if self.tokenizer.chat_template else PLAIN
        return encode_messages(self.tokenizer, [*first, *self.messages, ("user", question)], template=template)

    def answer(self, question: str) -> Iterator[str]:
        """The answer, in pieces. What has come belongs to the conversation, also where the caller stops listening.

        Raises:
            BitwrightError: BW403 if the conversation does not fit the context; it is left as it was.
        """
        tokens = self.encode(question)
        cache, kept = self._prepare(tokens)
        started, pieces, is_whole = time.perf_counter(), [], False
        try:
            text = stream_text(
                self.model, self.tokenizer, tokens, max_tokens=self.max_tokens, sampling=self.sampling, cache=cache
            )
            for piece in text:
                pieces.append(piece)
                yield piece
            is_whole = True
        finally:
            written = max(0, cache.get_seq_length() - len(tokens)) + bool(pieces)
            if is_whole:
                self._cache, self._known = cache, tokens
            else:
                self._cache, self._known = None, []  # a step that was broken off has reached some layers only
            if pieces or is_whole:
                self.messages += [("user", question), ("assistant", "".join(pieces))]
                seconds = time.perf_counter() - started
                self.turns.append(Turn(len(tokens) - kept, kept, written, seconds, cache.nbytes))

    def _prepare(self, tokens: list[int]) -> tuple[QuantizedCache, int]:
        """A cache that begins as ``tokens`` do, and how many of them it has."""
        pairs = zip(self._known, tokens[:-1], strict=False)
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
        if self._cache is not None and same:
            try:
                self._cache.crop(same - self._cache.get_seq_length())
            except ArgumentError:  # groups with one scale, or a sliding window, cannot be cut there
                self._cache = None
        if self._cache is None or not same:
            return self._new_cache(), 0
        return self._cache, same

    def _new_cache(self) -> QuantizedCache:
        return QuantizedCache(self.model, self.scheme, kv_safety="off")
