"""What a user sees when something goes wrong: one block on stderr and an exit status; a traceback only on request."""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import signal
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from typing import TextIO

from bitwright.core.errors import BitwrightError, Notice

__all__ = ["Interrupted", "notices_as_lines", "report_failure"]

# Said by torch's allocators, as RuntimeError.
OUT_OF_MEMORY = ("not enough memory", "can't allocate memory", "out of memory")


class Interrupted(BaseException):
    """A signal ended the command. Not an ``Exception``, so that no code below takes it for a failure of its own."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_status = 128 + number


def report_failure(failure: BaseException, arguments: Sequence[str], *, debug: bool) -> int:
    """Print what ``failure`` means to the user of ``bitwright ARGUMENTS`` on stderr; return the exit status."""
    if debug:
        traceback.print_exception(failure)
    if isinstance(failure, BrokenPipeError):
        _drop_output()  # the reader (head, a pager) has gone: nothing is wrong
        return 128 + signal.SIGPIPE
    if isinstance(failure, OSError) and _is_full(failure):
        try:
            sys.stdout.flush()
        except OSError:
            _drop_output()
    if isinstance(failure, KeyboardInterrupt):
        failure = Interrupted(signal.SIGINT, "stopped")
    if isinstance(failure, Interrupted):
        _print_error(str(failure))
        return failure.exit_status
    error = failure if isinstance(failure, BitwrightError) else _known(failure, arguments)
    if error is not None:
        _print_error(error.render())
        return error.exit_status
    what = f"error: {type(failure).__name__}: {failure}".rstrip(": ")
    _print_error(f"{what}\n  why: this is a defect of bitwright, not of your input\n  try: {_debug_command(arguments)}")
    return 1


def _drop_output() -> None:
    """Nothing more can be printed; a flush at exit must not complain either."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_RDWR), sys.stdout.fileno())


def _is_full(failure: OSError) -> bool:
    return failure.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


def _print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _debug_command(arguments: Sequence[str]) -> str:
    return f"{shlex.join(['bitwright', '--debug', *arguments])} shows where; please report it with that output"


def _known(failure: BaseException, arguments: Sequence[str]) -> BitwrightError | None:
    """The catalogue's error for exceptions that are not ours, where there is one."""
    usage = getattr(failure, "format_message", None)
    if usage is not None and hasattr(failure, "exit_code"):  # typer's usage errors, wherever it keeps their class
        context = getattr(failure, "ctx", None)
        command = context.command_path if context is not None else "bitwright"
        return BitwrightError("BW201", usage().rstrip("."), suggestion=f"{command} --help")
    text = str(failure).lower()
    if isinstance(failure, MemoryError) or (
        isinstance(failure, RuntimeError) and any(p in text for p in OUT_OF_MEMORY)
    ):
        levers = "fewer --samples, a smaller --seqlen, or a machine with more memory"
        return BitwrightError("BW503", "out of memory", why=str(failure), suggestion=levers)
    if isinstance(failure, OSError) and _is_full(failure):
        where = str(failure.filename or "standard output")  # what bitwright itself writes is known by name
        advice = "free disk space there, and run the same command again"
        return BitwrightError("BW501", f"cannot write: {failure.strerror}", where=where, suggestion=advice)
    return None


@contextlib.contextmanager
def notices_as_lines(*, debug: bool, stream: TextIO | None = None) -> Iterator[None]:
    """Show a :class:`Notice` as one line on stderr; other libraries' warnings are for developers (``--debug``)."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, Notice):
            print(f"notice: {message}", file=stream or sys.stderr)
        elif debug:
            print(warnings.formatwarning(message, category, filename, lineno, line), file=stream or sys.stderr, end="")

    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=Notice)
        warnings.showwarning = show
        yield
