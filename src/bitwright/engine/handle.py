"""What whoever asked holds in hand: the answer as it comes, its end, and the way to call it off."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from bitwright.core.errors import BitwrightError
from bitwright.engine.options import check_number
from bitwright.engine.sampler import Logprobs

__all__ = ["Completion", "Delta", "FinishReason", "RequestHandle", "Status", "refuse_copy"]

FinishReason = Literal["stop", "length", "cancelled"]


def refuse_copy(process: int) -> None:
    """Raise BW209 in a process that was forked from ``process``, where the engine's thread is."""
    if os.getpid() != process:
        what = "the engine belongs to the process from which this one was forked"
        raise BitwrightError("BW209", what, suggestion="make an engine in this process, after the fork")


class Status(enum.Enum):
    """Where a request is. It only ever goes down this list; the last three are ends."""

    WAITING = "waiting"
    PREFILLED = "prefilled"  # the prompt is computed, and the first token is there
    GENERATING = "generating"
    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_end(self) -> bool:
        return self in (Status.FINISHED, Status.CANCELLED, Status.FAILED)


@dataclass(frozen=True, slots=True)
class Delta:
    """What came since the last one: tokens, and text, which may lag behind them by a few."""

    tokens: tuple[int, ...]
    text: str
    logprobs: tuple[Logprobs, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A whole answer.

    Attributes:
        text: without the prompt, and without what ended it.
        tokens: all that were generated, with the one that ended the answer.
        finish_reason: ``stop`` (the model ended its text, or a stop text or token came), ``length`` or ``cancelled``.
        stopped_by: the stop text or token, if one came.
        prompt_tokens: how many there were.
        reused_tokens: how many of those were in the cache already when the request was first begun.
        seed: with which the same answer comes again.
        logprobs: one for each token, where the request wants them.
        preemptions: how often the request had to give up its room in the cache for a while.
        time_to_first_token, seconds: since the request was made.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    stopped_by: str | int | None
    prompt_tokens: int
    reused_tokens: int
    seed: int
    logprobs: tuple[Logprobs, ...]
    preemptions: int
    time_to_first_token: float | None
    seconds: float


class RequestHandle:
    """One request to an engine, for one reader.

    Iterating, or ``async for``, gives the text in pieces; ``next`` gives tokens too; ``result`` and ``wait`` give the
    whole.

    Example:
        >>> handle = engine.submit("Once upon a time", max_tokens=20)
        >>> for piece in handle:
        ...     print(piece, end="")
        >>> handle.result().finish_reason
        'length'
    """

    def __init__(self, number: int, cancel: Callable[[int], None]) -> None:
        self.number = number
        self._cancel, self._process = cancel, os.getpid()
        self._changed = threading.Condition()
        self._status = Status.WAITING
        self._deltas: deque[Delta] = deque()
        self._completion: Completion | None = None
        self._error: BitwrightError | None = None
        self._wakers: list[Callable[[], None]] = []
        self.reused_tokens = 0  # of the prompt, found in the cache when the request was begun

    @property
    def status(self) -> Status:
        return self._status

    @property
    def unread(self) -> bool:
        """Whether something has come that :meth:`next` has not given yet."""
        return bool(self._deltas)

    def cancel(self) -> None:
        """Call the request off; its answer then is what has come until the engine's next step."""
        self._cancel(self.number)

    def next(self, timeout: float | None = None) -> Delta | None:
        """What has come since the last call, waiting for it at most ``timeout`` seconds; ``None`` for nothing.

        Raises:
            BitwrightError: what made the request fail, once all that came before is read.
        """
        refuse_copy(self._process)
        with self._changed:
            self._changed.wait_for(lambda: self._deltas or self._status.is_end, timeout)
            return self._take()

    def result(self, timeout: float | None = None) -> Completion:
        """The whole answer, when it has ended.

        Raises:
            ArgumentError: BW201 for a ``timeout`` that is no number of seconds.
            BitwrightError: what made the request fail.
            TimeoutError: if it has not ended after ``timeout`` seconds; it goes on.
        """
        refuse_copy(self._process)
        if timeout is not None:
            most = threading.TIMEOUT_MAX
            check_number("timeout", timeout, lambda seconds: 0 <= seconds <= most, f"from 0 to {most:g} seconds")
        with self._changed:
            if not self._changed.wait_for(lambda: self._status.is_end, timeout):
                raise TimeoutError(f"request {self.number} has not ended after {timeout} s")
            return self._ended()

    def __iter__(self) -> Iterator[str]:
        while (delta := self.next()) is not None:
            if delta.text:
                yield delta.text

    async def wait(self) -> Completion:
        """As :meth:`result`, for asyncio; cancelling the task cancels the request."""
        try:
            while not self._status.is_end:
                await self._news(lambda: self._status.is_end)
        except asyncio.CancelledError:
            self.cancel()
            raise
        return self._ended()

    async def __aiter__(self) -> AsyncIterator[str]:
        try:
            while True:
                await self._news(lambda: bool(self._deltas) or self._status.is_end)
                with self._changed:
                    delta = self._take()
                if delta is None:
                    return
                if delta.text:
                    yield delta.text
        finally:
            if not self._status.is_end:
                self.cancel()

    async def _news(self, is_there: Callable[[], bool]) -> None:
        """Return when ``is_there``, which the engine's thread makes so."""
        refuse_copy(self._process)
        loop = asyncio.get_running_loop()
        while True:
            event = asyncio.Event()

            def wake(event: asyncio.Event = event) -> None:
                with contextlib.suppress(RuntimeError):  # the loop of the reader may be closed by now
                    loop.call_soon_threadsafe(event.set)

            with self._changed:
                if is_there():
                    return
                self._wakers.append(wake)
            await event.wait()

    def _take(self) -> Delta | None:
        if not self._deltas:
            if self._error is not None:
                self._ended()
            return None
        deltas = list(self._deltas)
        self._deltas.clear()
        return Delta(
            tuple(token for delta in deltas for token in delta.tokens),
            "".join(delta.text for delta in deltas),
            tuple(each for delta in deltas for each in delta.logprobs),
        )

    def _ended(self) -> Completion:
        if self._error is not None:
            error = self._error
            parts = {"where": error.where, "why": error.why, "suggestion": error.suggestion}
            raise type(error)(error.code, error.what, **parts) from error  # each reader has a traceback of its own
        assert self._completion is not None
        return self._completion

    # What follows is called by the engine's thread.

    def put(self, delta: Delta, status: Status) -> None:
        """Hand over what has come."""
        self._change(status, delta, None, None)

    def end(self, status: Status, completion: Completion | None, error: BitwrightError | None = None) -> None:
        """End the request, once."""
        self._change(status, None, completion, error)

    def _change(
        self, status: Status, delta: Delta | None, completion: Completion | None, error: BitwrightError | None
    ) -> None:
        with self._changed:
            if self._status.is_end:
                return
            if delta is not None:
                self._deltas.append(delta)
            self._status, self._completion, self._error = status, completion, error
            wakers, self._wakers = self._wakers, []
            self._changed.notify_all()
        for wake in wakers:
            wake()
