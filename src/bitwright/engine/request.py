"""One request as the engine knows it: what it has, what is computed of it, and where that lies."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from bitwright.engine.answer_text import AnswerText
from bitwright.engine.handle import Completion, Delta, FinishReason, RequestHandle, Status
from bitwright.engine.options import RequestOptions
from bitwright.engine.pages import page_hashes
from bitwright.engine.sampler import Logprobs, Sampler
from bitwright.models.paged_cache import PAGE

__all__ = ["Request"]


@dataclass(slots=True, eq=False, kw_only=True)
class Request:
    """The state of a request; the engine's thread alone changes it, but for ``is_cancelled``.

    Attributes:
        tokens: the prompt and what is generated so far.
        limit: how many tokens are generated at most.
        ends: the tokens that end the answer.
        pages: where keys and values of the first ``computed`` tokens lie, and room for more.
        hashes: of the full pages of ``tokens``.
        reused: how many tokens were in the cache when the request was first begun.
        guesses: how many tokens are guessed next.
    """

    handle: RequestHandle
    options: RequestOptions
    tokens: list[int]
    prompt_length: int
    limit: int
    seed: int
    ends: frozenset[int]
    sampler: Sampler
    text: AnswerText
    created: float = field(default_factory=time.perf_counter)
    pages: list[int] = field(default_factory=list)
    hashes: list[bytes] = field(default_factory=list)
    computed: int = 0
    reused: int | None = None
    preemptions: int = 0
    guesses: int = 1
    first_token_after: float | None = None
    is_cancelled: bool = False
    shown: list[str] = field(default_factory=list)
    logprobs: list[Logprobs] = field(default_factory=list)

    @property
    def number(self) -> int:
        return self.handle.number

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.prompt_length :]

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_length

    def hash_pages(self, salt: bytes) -> list[bytes]:
        """The hashes of all full pages of the tokens."""
        done = len(self.hashes)
        if len(self.tokens) >= (done + 1) * PAGE:
            before = self.hashes[-1] if self.hashes else b""
            self.hashes += page_hashes(self.tokens[done * PAGE :], salt, before)
        return self.hashes

    def learn(self, made: int, right: int) -> None:
        """Guess twice as many next time if all were right, else as many as were, but always one: it costs little."""
        if made:
            self.guesses = 2 * made if right == made else max(1, right)

    def append(self, token: int, logprobs: Logprobs | None) -> FinishReason | None:
        """Add a generated token, hand over what can be shown, and say whether the answer has ended."""
        self.tokens.append(token)
        if self.first_token_after is None:
            self.first_token_after = time.perf_counter() - self.created
        if logprobs is not None:
            self.logprobs.append(logprobs)
        is_end = token in self.ends
        piece = "" if is_end else self.text.add(token)
        reason: FinishReason | None = None
        if is_end or self.generated >= self.limit:
            piece += self.text.finish()  # in which a stop text may come to light
            reason = "length"
        if is_end or self.text.stopped_by is not None:
            reason = "stop"
        self.shown.append(piece)
        status = Status.PREFILLED if self.generated == 1 else Status.GENERATING
        self.handle.put(Delta((token,), piece, () if logprobs is None else (logprobs,)), status)
        return reason

    def show_rest(self) -> None:
        """Hand over what was held back, where no more tokens come."""
        piece = self.text.finish()
        self.shown.append(piece)
        if piece:
            self.handle.put(Delta((), piece), self.handle.status)

    def completion(self, reason: FinishReason) -> Completion:
        """The answer as it is now."""
        stopped_by: str | int | None = self.text.stopped_by
        if stopped_by is None and reason == "stop" and self.tokens[-1] in self.options.stop_ids:
            stopped_by = self.tokens[-1]
        return Completion(
            text="".join(self.shown),
            tokens=tuple(self.answer),
            finish_reason=reason,
            stopped_by=stopped_by,
            prompt_tokens=self.prompt_length,
            reused_tokens=self.reused or 0,
            seed=self.seed,
            logprobs=tuple(self.logprobs),
            preemptions=self.preemptions,
            time_to_first_token=self.first_token_after,
            seconds=time.perf_counter() - self.created,
        )
