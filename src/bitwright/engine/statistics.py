"""What an engine has done so far."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from bitwright.engine.handle import Completion
from bitwright.engine.request import Request

__all__ = ["Counters", "Statistics"]

RECENT = 1000  # requests, of whose first tokens the median is told


@dataclass(frozen=True, slots=True, kw_only=True)
class Statistics:
    """Figures of an engine since it began.

    Attributes:
        waiting, running: requests now.
        finished, cancelled, failed: requests so far.
        steps: so far; ``busy_seconds``: what they took.
        prompt_tokens: of the requests that were begun; ``reused_tokens``: those of them found in the cache.
        generated_tokens: so far.
        drafted_tokens, accepted_tokens: guessed by speculation, and right.
        preemptions: how often a request gave up its room for a while.
        tokens_per_second: generated tokens over busy seconds.
        time_to_first_token: median of the last 1000 requests, in seconds; ``None`` before the first.
        cache_pages, cache_used, cache_kept: all pages of the cache; those of running requests; those kept for reuse.
        cache_bytes, weight_bytes: memory.
        decoder: which one runs the model.
    """

    waiting: int
    running: int
    finished: int
    cancelled: int
    failed: int
    steps: int
    busy_seconds: float
    prompt_tokens: int
    reused_tokens: int
    generated_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    preemptions: int
    tokens_per_second: float
    time_to_first_token: float | None
    cache_pages: int
    cache_used: int
    cache_kept: int
    cache_bytes: int
    weight_bytes: int
    decoder: str


@dataclass(slots=True)
class Counters:
    """The sums from which statistics are made."""

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    steps: int = 0
    busy_seconds: float = 0.0
    prompt_tokens: int = 0
    reused_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    first_tokens: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    def begin(self, requests: Sequence[Request]) -> None:
        """Add requests that are computed for the first time."""
        self.prompt_tokens += sum(request.prompt_length for request in requests)
        self.reused_tokens += sum(request.reused or 0 for request in requests)

    def count(self, completion: Completion) -> None:
        """Add a request that has ended without an error."""
        if completion.finish_reason == "cancelled":
            self.cancelled += 1
        else:
            self.finished += 1
        if completion.time_to_first_token is not None:
            self.first_tokens.append(completion.time_to_first_token)

    @property
    def tokens_per_second(self) -> float:
        return self.generated_tokens / self.busy_seconds if self.busy_seconds else 0.0

    @property
    def time_to_first_token(self) -> float | None:
        return statistics.median(self.first_tokens) if self.first_tokens else None
