"""The queue of a request: tokens as they come, and where the request is."""

from __future__ import annotations

from dataclasses import dataclass

from bitwright.compat.dashinfer.allspark.names import GenerateRequestStatus
from bitwright.core.errors import BitwrightError
from bitwright.engine.handle import Delta, RequestHandle, Status

__all__ = ["GeneratedElements", "ResultQueue"]

STATUSES = {
    Status.WAITING: GenerateRequestStatus.Init,
    Status.PREFILLED: GenerateRequestStatus.ContextFinished,
    Status.GENERATING: GenerateRequestStatus.Generating,
    Status.FINISHED: GenerateRequestStatus.GenerateFinished,
    Status.CANCELLED: GenerateRequestStatus.GenerateInterrupted,
    Status.FAILED: GenerateRequestStatus.GenerateInterrupted,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratedElements:
    """What came since the last call.

    Attributes:
        ids_from_generate: tokens.
        token_logprobs_list: the log-probability of each, where the request wants it.
        log_probs_list: for each token the likeliest ones with theirs.
        prefix_cache_len: how many tokens of the prompt were found in the cache.
    """

    ids_from_generate: list[int]
    token_logprobs_list: list[float]
    log_probs_list: list[list[tuple[int, float]]]
    prefix_cache_len: int


class ResultQueue:
    """The tokens of one request; it can be read after the request, or its model, has been stopped."""

    def __init__(self, handle: RequestHandle, context_length: int) -> None:
        self._handle, self._context, self._generated = handle, context_length, 0

    def GenerateStatus(self) -> GenerateRequestStatus:
        """Where the request is; at its end only once everything has been read."""
        status = self._handle.status
        if status.is_end and self._handle.unread:
            status = Status.GENERATING
        return STATUSES[status]

    def Get(self) -> GeneratedElements | None:
        """Wait for tokens; ``None`` once there are none to come."""
        return self._take(None)

    def GetWithTimeout(self, timeout_ms: float) -> GeneratedElements | None:
        """As :meth:`Get`, at most so many milliseconds; then ``None``."""
        return self._take(max(0.0, timeout_ms / 1000))

    def GetNoWait(self) -> GeneratedElements | None:
        """What is there."""
        return self._take(0.0)

    def GenerateLength(self) -> int:
        """How many tokens were read."""
        return self._generated

    def ContextLength(self) -> int:
        """How many tokens the prompt has."""
        return self._context

    def _take(self, timeout: float | None) -> GeneratedElements | None:
        try:
            delta = self._handle.next(timeout)
        except BitwrightError:  # GenerateStatus tells of it
            return None
        return None if delta is None else self._elements(delta)

    def _elements(self, delta: Delta) -> GeneratedElements:
        self._generated += len(delta.tokens)
        return GeneratedElements(
            ids_from_generate=list(delta.tokens),
            token_logprobs_list=[each.logprob for each in delta.logprobs],
            log_probs_list=[list(each.top) for each in delta.logprobs],
            prefix_cache_len=self._handle.reused_tokens,
        )
