"""Seconds of work on a GPU: recorded in a graph, so that launching costs nothing, over operands that no cache holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

__all__ = ["Bench", "Section", "relative_error"]

COLD_BYTES = 256 << 20  # operands that are cycled through: several times the cache of the second level
MOST_COPIES = 64
Case = TypeVar("Case")


@dataclass(slots=True)
class Section:
    """A part of the run: the columns of its table, its rows, and what went wrong, if anything did."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, *cells: Any) -> None:
        assert len(cells) == len(self.columns), (self.title, cells)
        self.rows.append(cells)


@dataclass(slots=True)
class Bench:
    """Where things run, and what was found so far.

    Attributes:
        is_dry: tiny sizes on the CPU, every path once.
        deadline: of the clock ``time.monotonic``; nothing begins later.
        section_deadline: that of the section at work, so that no section takes the time of those after it.
        ceilings: bytes or operations per second, by name.
        sections: as far as they have come.
    """

    is_dry: bool
    deadline: float
    section_deadline: float = float("inf")
    ceilings: dict[str, float] = field(default_factory=dict)
    sections: list[Section] = field(default_factory=list)

    def begin(self, title: str, columns: tuple[str, ...]) -> Section:
        """A new section, which is printed and written with what it has, whatever happens to it."""
        self.sections.append(Section(title, columns))
        return self.sections[-1]

    def within(self, section: Section, cases: Iterable[Case]) -> Iterator[Case]:
        """The cases that there is time for; those left out are named."""
        left = []
        for case in cases:
            if time.monotonic() > min(self.deadline, self.section_deadline):
                left.append(case)
            else:
                yield case
        if left:
            section.notes.append(f"out of time, so left out: {'; '.join(map(str, left))}")

    @contextmanager
    def attempt(self, section: Section, case: object) -> Iterator[None]:
        """What may fail without the rows after it: why it did is a note."""
        try:
            yield
        except Exception as error:
            if self.is_dry:
                raise
            section.notes.append(f"{case} failed: {type(error).__name__}: {' '.join(str(error).split())[:400]}")

    @property
    def device(self) -> torch.device:
        return torch.device("cpu" if self.is_dry else "cuda")

    @property
    def dtype(self) -> torch.dtype:
        """Of activations. (The interpreter of a dry run knows float16 better.)"""
        return torch.float16 if self.is_dry else torch.bfloat16

    def size(self, full: int, tiny: int) -> int:
        return tiny if self.is_dry else full

    def copies(self, nbytes: int) -> int:
        """How many operands of so many bytes are cycled through."""
        return 1 if self.is_dry else max(1, min(MOST_COPIES, -(-COLD_BYTES // max(1, nbytes))))

    def seconds(self, calls: Sequence[Callable[[], Any]], least: float = 0.02, rounds: int = 5) -> float:
        """The median time of one of ``calls``, which are made in turn, all of them many times."""
        if self.is_dry:
            started = time.perf_counter()
            for call in calls:
                call()
            return (time.perf_counter() - started) / len(calls)
        return _graphed_seconds(calls, least, rounds)

    def cold_seconds(self, make: Callable[[], Any], use: Callable[[Any], Any], nbytes: int) -> float:
        """The time of ``use`` on what ``make`` makes, which takes ``nbytes``, when it comes from memory."""
        operands = [make() for _ in range(self.copies(nbytes))]
        return self.seconds([partial(use, operand) for operand in operands])

    def host_seconds(self, call: Callable[[], Any]) -> float:
        """The time of ``call``, which records graphs itself, one after the other, launching included."""
        for _ in range(2):
            call()
        self.wait()
        repeats, started = self.size(50, 1), time.perf_counter()
        for _ in range(repeats):
            call()
        self.wait()
        return (time.perf_counter() - started) / repeats

    def wait(self) -> None:
        if not self.is_dry:
            torch.cuda.synchronize()


def _graphed_seconds(calls: Sequence[Callable[[], Any]], least: float, rounds: int) -> float:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:  # compiles what has to be
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()
    torch.cuda.synchronize()
    first.record()
    graph.replay()
    last.record()
    torch.cuda.synchronize()
    repeats = max(1, min(200, round(1e3 * least / max(1e-3, first.elapsed_time(last)))))
    found = []
    for _ in range(rounds):
        first.record()
        for _ in range(repeats):
            graph.replay()
        last.record()
        torch.cuda.synchronize()
        found.append(first.elapsed_time(last) / 1e3 / repeats / len(calls))
    return statistics.median(found)


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference, relative to that of ``exact`` (float64)."""
    return float((found.double() - exact).norm() / exact.norm())
