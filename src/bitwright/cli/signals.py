"""Ctrl-C once: stop after the block; twice: stop now. SIGTERM: stop after the block, or now if that takes 10 s."""

from __future__ import annotations

import contextlib
import queue
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from bitwright.cli.failures import Interrupted

__all__ = ["StopRequest", "stop_on_signals"]

GRACE_SECONDS = 10.0
LAST_WORDS = 1.0  # seconds that an announcement may still take when all is over


class StopRequest:
    """Whether a signal asked to stop, and which (the last one). Calling it answers the first question."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __call__(self) -> bool:
        return self.number is not None


@contextlib.contextmanager
def stop_on_signals(announce: Callable[[int], None], describe_stop: Callable[[], str]) -> Iterator[StopRequest]:
    """Turn signals into a request to stop for as long as the context lasts; outside it they act as before.

    A signal that is ignored (as nohup does) stays so, and only the main thread of a process can listen at all.

    Args:
        announce: called with the number of the first signal, to tell the user what happens now; in a thread of its own,
            since a handler may have come in the middle of a line that is being printed.
        describe_stop: what :class:`Interrupted` says when work is broken off at once.
    """
    request = StopRequest()
    heard_numbers: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # what a handler may put into at any moment

    def stop_now(number: int, frame: FrameType | None) -> None:
        raise Interrupted(request.number or number, describe_stop())

    def handle(number: int, frame: FrameType | None) -> None:
        if request.number is not None:
            stop_now(number, frame)
        request.number = number
        if number == signal.SIGTERM:
            signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)
        heard_numbers.put(number)

    handlers = {signal.SIGINT: handle, signal.SIGTERM: handle, signal.SIGALRM: stop_now}
    if threading.current_thread() is not threading.main_thread():
        handlers = {}
    heard = {number: handler for number, handler in handlers.items() if signal.getsignal(number) != signal.SIG_IGN}
    herald = threading.Thread(target=_announce, args=(heard_numbers, announce), daemon=True)
    herald.start()
    previous = {number: signal.signal(number, handler) for number, handler in heard.items()}
    try:
        yield request
    finally:
        if request.number == signal.SIGTERM:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in previous.items():
            signal.signal(number, handler)
        heard_numbers.put(None)
        herald.join(LAST_WORDS)


def _announce(numbers: queue.SimpleQueue[int | None], announce: Callable[[int], None]) -> None:
    while (number := numbers.get()) is not None:
        with contextlib.suppress(OSError, ValueError):  # nobody is left to be told
            announce(number)
