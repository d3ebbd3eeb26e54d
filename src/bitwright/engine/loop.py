"""The engine's own thread: take up requests, plan a step, run it, choose tokens, hand them over, and again."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from bitwright.core.errors import BitwrightError
from bitwright.engine.handle import Completion, FinishReason, Status, refuse_copy
from bitwright.engine.pages import PageAllocator
from bitwright.engine.pressure import Pressure
from bitwright.engine.request import Request
from bitwright.engine.runner import Runner
from bitwright.engine.scheduler import Scheduler, Work
from bitwright.engine.statistics import Counters, Statistics

__all__ = ["EngineLoop"]

NUMERIC = 6  # exit status of errors about numbers, which are those of some request


class EngineLoop:
    """Owns the thread and everything that it changes; other threads only add, cancel, close and count.

    An error of one request ends that request. Any other error ends all of them, and the engine.
    """

    def __init__(self, runner: Runner, allocator: PageAllocator, scheduler: Scheduler) -> None:
        self._runner, self._allocator, self._scheduler = runner, allocator, scheduler
        self._counters, self._pressure = Counters(), Pressure(runner, scheduler)
        self._changed, self._process = threading.Condition(), os.getpid()
        self._arrived: list[Request] = []
        self._open: dict[int, Request] = {}  # all that have not ended, wherever they are
        self._is_closing = False
        self._error: BitwrightError | None = None
        self._thread = threading.Thread(target=self._run, name="bitwright-engine", daemon=True)
        self._thread.start()

    def add(self, request: Request) -> None:
        """Take up a request.

        Raises:
            BitwrightError: BW209 if the engine is closed, BW505 if it has failed.
        """
        with self._changed:
            self.refuse_if_ended()
            self._open[request.number] = request
            self._arrived.append(request)
            self._changed.notify_all()

    def cancel(self, number: int) -> None:
        """Have a request end before the next step, if it has not ended."""
        if os.getpid() != self._process:  # a lock may have been forked while somebody held it
            return
        with self._changed:
            if number in self._open:
                self._open[number].is_cancelled = True
                self._changed.notify_all()

    def refuse_if_ended(self) -> None:
        """Raise BW209 if the engine is closed, or another process's, BW505 if it has failed."""
        refuse_copy(self._process)
        if self._error is not None:
            known = self._error
            raise BitwrightError(known.code, known.what, why=known.why, suggestion=known.suggestion) from known
        if self._is_closing:
            raise _closed()

    def close(self) -> None:
        """End all requests, and the thread; a second call does nothing, and one in a forked process neither."""
        if os.getpid() != self._process:
            return
        with self._changed:
            self._is_closing = True
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def statistics(self, decoder: str) -> Statistics:
        """What has been done so far."""
        refuse_copy(self._process)
        with self._changed:
            counters, scheduler = self._counters, self._scheduler
            return Statistics(
                waiting=len(scheduler.waiting) + len(self._arrived),
                running=len(scheduler.running),
                finished=counters.finished,
                cancelled=counters.cancelled,
                failed=counters.failed,
                steps=counters.steps,
                busy_seconds=counters.busy_seconds,
                prompt_tokens=counters.prompt_tokens,
                reused_tokens=counters.reused_tokens,
                generated_tokens=counters.generated_tokens,
                drafted_tokens=counters.drafted_tokens,
                accepted_tokens=counters.accepted_tokens,
                preemptions=scheduler.preemptions,
                tokens_per_second=counters.tokens_per_second,
                time_to_first_token=counters.time_to_first_token,
                cache_pages=self._allocator.count,
                cache_used=self._allocator.used,
                cache_kept=self._allocator.known,
                cache_bytes=self._runner.cache.bytes(),
                weight_bytes=self._runner.decoder.weight_bytes(),
                decoder=decoder,
            )

    # What follows runs in the engine's thread.

    def _run(self) -> None:
        error = _closed()
        try:
            while self._take_up():
                self.step()
        except BaseException as failure:  # also what a thread can be interrupted by: whoever waits must not hang
            error = _failed(failure)
            self._error = error
        self._end_all(error)

    def _take_up(self) -> bool:
        """Wait for something to do; ``False`` if it is to end."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closing or self._arrived or self._scheduler.requests)
            for request in self._arrived:
                self._scheduler.add(request)
            self._arrived.clear()
            if self._is_closing:
                return False
            for request in [each for each in self._scheduler.requests if each.is_cancelled]:
                self._finish(request, "cancelled")
        return True

    def step(self) -> None:
        """Plan, run, choose, hand over. A step that memory runs out in is only made smaller."""
        began = time.perf_counter()
        with self._changed:
            new = [request for request in self._scheduler.waiting if request.reused is None]
            works = self._scheduler.plan()
            self._counters.begin([request for request in new if request.reused is not None])
        if not works:
            return
        try:
            logits = self._runner.run(works)
        except torch.OutOfMemoryError as error:
            with self._changed:
                self._pressure.relieve(works, error)
            return
        except BitwrightError as error:
            if error.exit_status != NUMERIC:
                raise
            works, logits = self._run_apart(works)
        with self._changed:
            self._pressure.ease()
            for work, rows in zip(works, logits, strict=True):
                self._advance(work, rows)
            self._counters.steps += 1
            self._counters.busy_seconds += time.perf_counter() - began

    def _run_apart(self, works: Sequence[Work]) -> tuple[list[Work], list[NDArray[np.float32]]]:
        """Each work by itself, where numbers of one of them end a step of all: its request fails alone."""
        sound, logits = list[Work](), list[NDArray[np.float32]]()
        for work in works:
            try:
                logits += self._runner.run([work])
            except BitwrightError as error:
                if error.exit_status != NUMERIC:
                    raise
                with self._changed:
                    self._fail(work.request, error)
            else:
                sound.append(work)
        return sound, logits

    def _advance(self, work: Work, rows: NDArray[np.float32]) -> None:
        """Bring a request on by what a step computed for it."""
        request, wants_token = work.request, work.wants_token
        request.computed += work.count
        if not wants_token:
            self._scheduler.publish(request)
            return
        try:
            reason = self._choose(request, work.draft, rows)
        except BitwrightError as error:
            self._fail(request, error)
            return
        self._scheduler.publish(request)
        if reason is not None:
            self._finish(request, reason)

    def _choose(self, request: Request, draft: Sequence[int], rows: NDArray[np.float32]) -> FinishReason | None:
        """Choose the next token, and further ones as long as the guesses were right."""
        self._counters.drafted_tokens += len(draft)
        for right, (row, guess) in enumerate(zip(rows, [*draft, None], strict=True)):
            token, logprobs = request.sampler.choose(row)
            self._counters.generated_tokens += 1
            reason = request.append(token, logprobs)
            if reason is not None or token != guess:
                request.learn(len(draft), right)
                return reason
            request.computed += 1  # the guess was computed in this step already
            self._counters.accepted_tokens += 1
        return None

    def _finish(self, request: Request, reason: FinishReason) -> None:
        if reason == "cancelled":
            request.show_rest()
        completion = request.completion(reason)
        self._scheduler.remove(request)
        self._counters.count(completion)
        self._end(request, Status.CANCELLED if reason == "cancelled" else Status.FINISHED, completion)

    def _fail(self, request: Request, error: BitwrightError) -> None:
        """End one request with its error; what it computed may not be finite, and must not be met by another."""
        own = self._allocator.unshared(request.pages)
        self._allocator.forget(own)
        self._runner.cache.clear(own)
        self._scheduler.remove(request)
        self._counters.failed += 1
        self._end(request, Status.FAILED, None, error)

    def _end_all(self, error: BitwrightError) -> None:
        """Nobody is left waiting, whatever state a failure has left behind."""
        try:
            with self._changed:
                self._arrived.clear()
                for request in self._scheduler.requests:
                    self._scheduler.remove(request)
        finally:
            with self._changed:
                self._counters.failed += len(self._open)
                for request in list(self._open.values()):
                    self._end(request, Status.FAILED, None, error)

    def _end(
        self, request: Request, status: Status, completion: Completion | None, error: BitwrightError | None = None
    ) -> None:
        del self._open[request.number]
        request.handle.end(status, completion, error)


def _closed() -> BitwrightError:
    return BitwrightError("BW209", "the engine is closed", suggestion="make another one")


def _failed(failure: BaseException) -> BitwrightError:
    """What everybody who waits is told; the failure itself, with its traceback, is the cause."""
    if isinstance(failure, BitwrightError):
        return failure
    is_memory = isinstance(failure, MemoryError) or "allocate" in str(failure)
    what = "there is not enough memory for a step" if is_memory else "the engine has failed"
    why = f"{type(failure).__name__}: {failure}".partition("\n")[0]
    advice = "fewer step_tokens, or a smaller cache" if is_memory else "make another one, and report this"
    error = BitwrightError("BW503" if is_memory else "BW505", what, why=why, suggestion=advice)
    error.__cause__ = failure
    return error
