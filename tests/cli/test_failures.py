"""Whatever is raised becomes one block on stderr and the right exit status."""

from __future__ import annotations

import errno
import io
import warnings

import pytest

from bitwright.cli.failures import Interrupted, notices_as_lines, report_failure
from bitwright.core.errors import CATALOGUE, BitwrightError, Notice

KNOWN = [
    (
        BitwrightError("BW302", "bad", where="f", why="w", suggestion="t"),
        3,
        "error[BW302]: bad\n  where: f\n  why: w\n  try: t\n",
    ),
    (BitwrightError("BW203", "there"), 2, "error[BW203]: there\n"),
    (MemoryError("x"), 5, "error[BW503]: out of memory"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), 5, "error[BW503]"),
    (OSError(errno.ENOSPC, "No space left on device", "f"), 5, "error[BW501]: cannot write: No space left on device"),
    (KeyboardInterrupt(), 130, "stopped\n"),
    (Interrupted(15, "stopped; to resume: x"), 143, "stopped; to resume: x\n"),
    (KeyError("name"), 1, "error: KeyError: 'name'\n"),
]


@pytest.mark.parametrize(("failure", "status", "beginning"), KNOWN)
def test_failures(failure: BaseException, status: int, beginning: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_failure(failure, ["quantize", "a b"], debug=False) == status
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(beginning)
    assert "Traceback" not in captured.err


def test_a_defect_says_how_to_see_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert report_failure(KeyError("name"), ["quantize", "a b"], debug=False) == 1
    assert "bitwright --debug quantize 'a b'" in capsys.readouterr().err


def test_debug_shows_the_traceback_first(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(BitwrightError) as caught:
        raise BitwrightError("BW401", "empty")
    assert report_failure(caught.value, [], debug=True) == 4
    err = capsys.readouterr().err
    assert err.startswith("Traceback")
    assert err.endswith("error[BW401]: empty\n")


@pytest.mark.parametrize("code", CATALOGUE)
def test_the_exit_status_is_the_hundreds_digit(code: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_failure(BitwrightError(code, "x"), [], debug=False) == int(code[2])
    assert 2 <= int(code[2]) <= 6


def test_notices_are_lines_and_other_warnings_are_not() -> None:
    stream = io.StringIO()
    with notices_as_lines(debug=False, stream=stream):
        warnings.simplefilter("always", DeprecationWarning)
        warnings.warn(Notice("few samples"), stacklevel=1)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert stream.getvalue() == "notice: few samples\n"


def test_debug_shows_other_warnings() -> None:
    stream = io.StringIO()
    with notices_as_lines(debug=True, stream=stream):
        warnings.simplefilter("always", DeprecationWarning)
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert "DeprecationWarning: old" in stream.getvalue()
