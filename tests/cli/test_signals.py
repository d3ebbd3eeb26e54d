"""Signals ask to stop, once; they are heard only where that is possible, and act as before afterwards."""

from __future__ import annotations

import io
import os
import signal
import threading
import time

import pytest

from bitwright.cli import signals
from bitwright.cli.failures import Interrupted
from bitwright.cli.progress import PlainLines
from bitwright.cli.signals import stop_on_signals

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)


def handlers() -> list[object]:
    return [signal.getsignal(number) for number in NUMBERS]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_request(number: int) -> None:
    before, announced = handlers(), []
    with stop_on_signals(announced.append, lambda: "broken off") as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
    assert (stop.number, announced) == (number, [number])
    assert handlers() == before


def test_a_signal_in_the_middle_of_a_line_is_announced_after_it() -> None:
    """Buffered streams refuse to be entered by a handler that interrupted them."""
    reading, writing = os.pipe()
    with open(writing, "w", buffering=1 << 20) as stream, open(reading) as lines:
        real, sent = stream.buffer, []

        class Interrupting(io.TextIOWrapper):
            def write(self, text: str) -> int:
                if not sent:
                    sent.append(os.kill(os.getpid(), signal.SIGINT))  # the handler runs here, inside of print
                return super().write(text)

        printed = Interrupting(real, line_buffering=True)
        progress = PlainLines(printed)
        with stop_on_signals(lambda number: progress.say("stopping"), lambda: "") as stop:
            progress.say("a line")
            assert stop()
        assert [lines.readline(), lines.readline()] == ["a line\n", "stopping\n"]
        printed.detach()


def test_an_announcement_that_fails_or_hangs_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "LAST_WORDS", 0.05)
    stuck = threading.Event()

    def broken(number: int) -> None:
        raise BrokenPipeError

    for announce in (broken, lambda number: stuck.wait(30)):
        with stop_on_signals(announce, lambda: "") as stop:  # type: ignore[arg-type]
            os.kill(os.getpid(), signal.SIGINT)
            assert stop()
    stuck.set()


@pytest.mark.parametrize(("first", "second"), [(2, 2), (2, 15), (15, 2)])
def test_the_second_signal_breaks_off(first: int, second: int) -> None:
    before = handlers()
    with (
        pytest.raises(Interrupted, match="broken off") as caught,
        stop_on_signals(lambda number: None, lambda: "broken off"),
    ):
        os.kill(os.getpid(), first)
        os.kill(os.getpid(), second)
    assert caught.value.exit_status == 128 + first
    assert handlers() == before


def test_the_alarm_of_sigterm_is_off_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.05)
    with stop_on_signals(lambda number: None, lambda: "broken off"):
        os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_work_that_goes_on_after_sigterm_is_broken_off_when_its_grace_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.05)
    with pytest.raises(Interrupted), stop_on_signals(lambda number: None, lambda: "broken off"):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with stop_on_signals(lambda number: None, lambda: "") as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop()
    finally:
        signal.signal(signal.SIGINT, before)


def test_another_thread_hears_nothing_and_works() -> None:
    answers: list[bool] = []

    def work() -> None:
        with stop_on_signals(lambda number: None, lambda: "") as stop:
            answers.append(stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert answers == [False]
