"""Events of a long run on the screen: two live lines on a terminal, plain lines elsewhere, JSON lines on request."""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

from bitwright.cli.tables import format_duration
from bitwright.cli.terminal import printable
from bitwright.core.settings import read_settings

__all__ = ["JsonLines", "LiveLines", "PlainLines", "Progress", "ProgressEvent", "choose_progress", "describe_unit"]

BAR_WIDTH = 24


class ProgressEvent(Protocol):
    """What is read of an event; quantization and evaluation each have a record of this shape."""

    @property
    def kind(self) -> str: ...
    @property
    def message(self) -> str: ...
    @property
    def data(self) -> Mapping[str, Any]: ...


class Progress(Protocol):
    """Shows events; ``say`` prints a sentence between them, ``close`` leaves the screen in order."""

    def __call__(self, event: ProgressEvent) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


def choose_progress(*, as_json: bool, plain: bool, stream: TextIO | None = None) -> Progress:
    """The display that was asked for, and plain lines where the output is no terminal."""
    stream = stream or sys.stdout
    if as_json:
        return JsonLines(stream)
    if plain or not stream.isatty():
        return PlainLines(stream)
    return LiveLines(stream, color=not read_settings().no_color)


class PlainLines:
    """One line for each finished unit, and for everything that is said; work inside a unit is not shown."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        # Events come from the thread that writes, too, and what is said from one that waits for signals.
        self.lock = threading.RLock()

    def __call__(self, event: ProgressEvent) -> None:
        if event.kind != "progress":
            self.say(describe_unit(event) if event.kind == "unit" else event.message)

    def say(self, text: str) -> None:
        with self.lock:
            print(printable(text), file=self.stream, flush=True)

    def close(self) -> None:
        return


class JsonLines(PlainLines):
    """Each event is one JSON object on a line of its own: ``event``, ``message`` and the event's data."""

    def __call__(self, event: ProgressEvent) -> None:
        self.say(json.dumps({"event": event.kind, "message": event.message, **event.data}, default=str))


class LiveLines(PlainLines):
    """A line for the whole run and one for the unit at work, rewritten in place; other events scroll above them."""

    def __init__(self, stream: TextIO, *, color: bool) -> None:
        super().__init__(stream)
        self.color = color
        self.live = ["", ""]
        self.shown = 0

    def __call__(self, event: ProgressEvent) -> None:
        with self.lock:
            self._show(event)

    def _show(self, event: ProgressEvent) -> None:
        if event.kind == "unit":
            self.live = [f"{self._bar(event.data)} {printable(describe_unit(event))}", ""]
        elif event.kind == "progress":
            self.live[1] = f"  {printable(event.message)}"
        else:
            self.say(event.message)
            return
        self._draw()

    def say(self, text: str) -> None:
        with self.lock:
            self._erase()
            super().say(text)
            self._draw()

    def close(self) -> None:
        """Keep the last state of the run on the screen, and go below it."""
        with self.lock:
            self.live[1] = ""
            self._draw()
            self.live, self.shown = ["", ""], 0

    def _bar(self, data: Mapping[str, Any]) -> str:
        filled = BAR_WIDTH * int(data.get("done", 0)) // max(1, int(data.get("total", 1)))
        done = "█" * filled
        return (f"\x1b[32m{done}\x1b[0m" if self.color else done) + "░" * (BAR_WIDTH - filled)

    def _erase(self) -> None:
        if self.shown:
            self.stream.write(f"\x1b[{self.shown}A\r\x1b[J")
        self.shown = 0

    def _draw(self) -> None:
        self._erase()
        width = shutil.get_terminal_size().columns - 1
        for line in filter(None, self.live):
            escapes = len("\x1b[32m\x1b[0m") if "\x1b" in line else 0
            self.stream.write(line[: width + escapes] + "\n")
            self.shown += 1
        self.stream.flush()


def describe_unit(event: ProgressEvent) -> str:
    """One finished unit with what is left: ``[17/32] model.layers.16: error 0.0042, 3.1 s, ready in 47 s``."""
    data = event.data
    text = f"[{data['done']}/{data['total']}] {event.message}" if "done" in data and "total" in data else event.message
    eta = data.get("eta_seconds")
    return f"{text}, ready in {format_duration(eta)}" if eta and data.get("done") != data.get("total") else text
