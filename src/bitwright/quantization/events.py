"""What a long run tells the outside while it works."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["Event", "EventSink", "Stopped", "ignore_event"]


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened. ``message`` is a sentence for people, ``data`` the same for programs (JSON-ready).

    Kinds: ``plan`` (before any work), ``resume`` (finished blocks were found), ``progress`` (inside a unit of work),
    ``unit`` (one block is done and on disk; ``data`` has ``done``, ``total``, ``seconds``, ``error``, ``eta_seconds``:
    ``None`` while it is not known),
    ``notice`` (something the user should know), ``result`` (all is done).
    """

    kind: Literal["plan", "resume", "progress", "unit", "notice", "result"]
    message: str
    data: Mapping[str, Any] = field(default_factory=dict)


EventSink = Callable[[Event], None]


class Stopped(Exception):
    """The run was asked to stop, and did so after a whole block: the same call resumes it."""

    def __init__(self, done: int, total: int) -> None:
        super().__init__(f"stopped after {done} of {total} units; run the same command again to resume")
        self.done, self.total = done, total


def ignore_event(event: Event) -> None:
    """The sink for callers who do not listen."""
