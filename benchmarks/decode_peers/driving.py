"""What a driver does: it makes an engine ready, and then answers lines of its input with seconds.

    prefill N         N tokens of one fresh sequence, until the logits of the last
    decode B STEPS    B sequences after 64 tokens each: STEPS tokens more, one of each sequence a step
    context N STEPS   one sequence after N tokens: STEPS tokens more
    memory            in bytes: the most that the process ever held; what it holds now; of that its share where others
                      hold the same pages; what it alone holds, or would have to write before it could be given up

It prints one line for each, and nothing else; "ready SECONDS" first: from the start of the process to the first token
after a prompt of 16.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Protocol

__all__ = ["CONTEXT", "FILLED", "Engine", "memory", "seconds_since_start", "serve"]

CONTEXT = 64
FILLED = 512  # tokens that are computed before the rest of a long context is copied from them


class Engine(Protocol):
    """Tokens are the engine's to choose: what they are changes no time."""

    def prefill(self, tokens: int) -> None: ...

    def start(self, sequences: int) -> None:
        """Fresh sequences of ``CONTEXT`` tokens each."""

    def fill(self, tokens: int) -> None:
        """One sequence of so many tokens, whose keys and values may be copies of those of the first."""

    def step(self) -> None:
        """One token more of each."""


def seconds_since_start() -> float:
    """Since the process began, by the kernel's record."""
    fields = Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()
    began = int(fields[19]) / 100
    return float(Path("/proc/uptime").read_text().split()[0]) - began


def serve(engine: Engine) -> None:
    """Answer until the input ends."""
    engine.prefill(16)
    _say(f"ready {seconds_since_start():.3f}")
    for line in sys.stdin:
        word, *numbers = line.split()
        if word == "memory":
            _say(" ".join(map(str, memory())))
            continue
        if word == "decode":
            engine.start(int(numbers[0]))
            engine.step()
        if word == "context":
            engine.fill(int(numbers[0]))
            engine.step()
        begin = time.perf_counter()
        if word == "prefill":
            engine.prefill(int(numbers[0]))
        else:
            for _ in range(int(numbers[1])):
                engine.step()
        _say(f"{time.perf_counter() - begin:.9f}")


def memory() -> tuple[int, int, int, int]:
    """The four numbers of ``memory``. Mapped files that are clean are in the second and third, not in the fourth."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    held = {name: int(size.split()[0]) * 1024 for name, _, size in (line.partition(":") for line in lines)}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return peak, held["Rss"], held["Pss"], held["Private_Dirty"]


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
