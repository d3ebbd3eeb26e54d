"""An engine and its handles in a forked process, which has no thread of theirs: an error at once, and no wait."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable

import pytest
from transformers import PreTrainedModel

from bitwright import Engine
from bitwright.core.errors import BitwrightError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
SECONDS = 20


def in_a_child(check: Callable[[], bool]) -> bool:
    """Whether ``check`` is true in a forked process, within some seconds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of forks beside threads
        child = os.fork()
    if not child:
        signal.alarm(SECONDS)  # which ends a child that hangs
        try:
            os._exit(0 if check() else 1)
        finally:
            os._exit(2)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def is_refused(call: Callable[[], object]) -> bool:
    try:
        call()
    except BitwrightError as error:
        return error.code == "BW209" and "forked" in error.what and bool(error.suggestion)
    return False


def test_a_forked_process_is_told(tiny: PreTrainedModel) -> None:
    with Engine(tiny) as engine:
        handle = engine.submit([1, 2, 3], max_tokens=100)

        def check() -> bool:
            handle.cancel()  # nothing to do, and nobody to wait for
            engine.close()
            calls: list[Callable[[], object]] = [
                lambda: engine.generate([[1]]), handle.result, handle.next, engine.statistics, lambda: list(handle),
            ]  # fmt: skip
            return all(is_refused(call) for call in calls)

        assert in_a_child(check)
        assert len(handle.result(20).tokens) == 100 and len(engine.generate([[1, 2, 3]], max_tokens=3)) == 1


def test_a_lock_that_was_held_when_the_process_forked_hangs_nobody(tiny: PreTrainedModel) -> None:
    with Engine(tiny) as engine, engine._loop._changed:
        assert in_a_child(lambda: engine.close() is None and is_refused(lambda: engine.submit([1])))
