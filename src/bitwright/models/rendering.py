"""Bounds on a program that came with a model: its chat template, which may loop for ever or build text without end."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from bitwright.core.memory import read_system_file

__all__ = ["OutOfBoundsError", "bounded"]

SECONDS = 10.0  # of a processor; a template takes a thousandth of that
LETTERS_A_SECOND = 50_000  # of what is given, which is encoded meanwhile: slow ones take a third of that time
MOST_MEMORY = 1 << 30  # bytes by which the process may grow meanwhile
MEMORY_A_LETTER = 1 << 10
LONGEST_TEXT = 4_000_000  # characters: a million tokens and more
LOOK_EVERY = 0.01  # seconds: within these nothing fills much memory, and most templates are done

Trace = Callable[[FrameType, str, Any], Any]


class OutOfBoundsError(BaseException):
    """What ran in :func:`bounded` passed a bound; no ``except Exception`` on its way stops it."""


@contextmanager
def bounded(
    *, letters: int = 0, seconds: float | None = None, memory: int | None = None, longest_text: int | None = None
) -> Iterator[None]:
    """End what this thread runs within when it passes a bound; ``None`` stands for the module's own.

    Before each line of Python the clock is read and, now and then, what this thread has taken of a processor, so that
    nothing ends because others work, and the memory of the process, where the system tells it (Linux); what each
    function returns is measured if it is text. So a loop ends, and text that grows step by step; one long operation
    within the interpreter does not (``2**10**9``). A text of so many ``letters`` that is given, and encoded here, has
    time and memory of its own. Other threads run on as before, and a trace
    function that was there, of a debugger or of coverage, is put back.

    Raises:
        OutOfBoundsError: with the bound that was passed.
    """
    seconds = (SECONDS if seconds is None else seconds) + letters // LETTERS_A_SECOND
    memory = (MOST_MEMORY if memory is None else memory) + letters * MEMORY_A_LETTER
    longest_text = LONGEST_TEXT if longest_text is None else longest_text
    before, beginning, resident = sys.gettrace(), time.thread_time(), _resident()
    look = time.monotonic() + min(LOOK_EVERY, seconds)

    def watch(_frame: FrameType, event: str, argument: object) -> Trace:
        nonlocal look
        now = time.monotonic()
        if now > look:
            look = now + LOOK_EVERY
            if time.thread_time() >= beginning + seconds:
                raise OutOfBoundsError(f"it takes longer than {seconds:g} seconds")
            if _resident() > resident + memory:
                raise OutOfBoundsError(f"it takes more than {memory >> 20} MiB of memory")
        if event == "return" and isinstance(argument, str) and len(argument) > longest_text:
            raise OutOfBoundsError(f"it makes a text of more than {longest_text} characters")
        return watch

    sys.settrace(watch)
    try:
        yield
    finally:
        sys.settrace(before)


def _resident() -> int:
    """Bytes of memory that this process holds; 0 where the system does not say."""
    fields = read_system_file(Path("/proc/self/statm")).split()
    return int(fields[1]) * os.sysconf("SC_PAGE_SIZE") if len(fields) > 1 else 0
