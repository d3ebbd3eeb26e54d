"""Events as plain lines, as JSON lines, and as live lines that leave the screen in order."""

from __future__ import annotations

import io
import json
import re

import pytest

from bitwright.cli.progress import JsonLines, LiveLines, PlainLines, choose_progress
from bitwright.quantization.events import Event

EVENTS = [
    Event("resume", "found 1/3 units"),
    Event("progress", "running 8 samples"),
    Event("unit", "blocks.1 done", {"done": 2, "total": 3, "seconds": 3.0, "eta_seconds": 125.0, "error": 0.5}),
    Event("notice", "odd"),
    Event("unit", "blocks.2 done", {"done": 3, "total": 3, "seconds": 3.0, "eta_seconds": 0.0, "error": 0.5}),
]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(text: str) -> list[str]:
    """What a terminal shows after ``text``: understands the two escapes that are used, refuses others."""
    lines = [""]
    for part in re.split(r"(\x1b\[\d+A\r\x1b\[J|\n)", re.sub(r"\x1b\[(32|0)m", "", text)):
        if part == "\n":
            lines.append("")
        elif part.startswith("\x1b"):
            up = int(part[2 : part.index("A")])
            del lines[len(lines) - up :]
            lines[-1:] = [""]
        else:
            assert "\x1b" not in part
            lines[-1] += part
    return lines


def test_plain_lines() -> None:
    stream = io.StringIO()
    progress = PlainLines(stream)
    for event in EVENTS:
        progress(event)
    progress.close()
    assert stream.getvalue().splitlines() == [
        "found 1/3 units",
        "[2/3] blocks.1 done, ready in 2 m 5 s",
        "odd",
        "[3/3] blocks.2 done",
    ]


def test_json_lines_hold_every_event() -> None:
    stream = io.StringIO()
    progress = JsonLines(stream)
    for event in EVENTS:
        progress(event)
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [record["event"] for record in records] == [event.kind for event in EVENTS]
    assert records[2] == {"event": "unit", "message": "blocks.1 done", **EVENTS[2].data}


def test_live_lines_are_rewritten_in_place() -> None:
    stream = Terminal()
    progress = LiveLines(stream, color=False)
    for event in EVENTS[:3]:
        progress(event)
    shown = screen(stream.getvalue())
    assert shown[0] == "found 1/3 units"
    assert shown[1].endswith(" [2/3] blocks.1 done, ready in 2 m 5 s")
    assert shown[2:] == [""]
    progress(Event("progress", "layer x"))
    assert screen(stream.getvalue())[2:] == ["  layer x", ""]
    progress(EVENTS[3])
    progress(EVENTS[4])
    progress.close()
    progress.say("after")
    shown = screen(stream.getvalue())
    assert [shown[0], shown[1], shown[3], shown[4]] == ["found 1/3 units", "odd", "after", ""]
    assert shown[2].endswith(" [3/3] blocks.2 done")
    assert len(shown) == 5


def test_long_live_lines_are_cut_to_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    stream = Terminal()
    progress = LiveLines(stream, color=True)
    progress(Event("unit", "x" * 200, {"done": 1, "total": 2}))
    assert [len(line) for line in screen(stream.getvalue())] == [39, 0]


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_names_cannot_move_the_cursor(stream: io.StringIO) -> None:
    progress = choose_progress(as_json=False, plain=False, stream=stream)
    for kind in ("notice", "progress", "unit"):
        progress(Event(kind, "a\x1b[2Jb\r", {"done": 1, "total": 2}))
    progress.say("c\x1b[2Jd")
    progress.close()
    assert "\x1b[2J" not in stream.getvalue()
    assert "\\x1b[2Jb\\r" in stream.getvalue()


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, colored in (("1", False), ("", True)):
        monkeypatch.setenv("NO_COLOR", value)
        stream = Terminal()
        choose_progress(as_json=False, plain=False, stream=stream)(EVENTS[2])
        assert ("\x1b[32m" in stream.getvalue()) == colored


def test_choice() -> None:
    assert type(choose_progress(as_json=True, plain=False, stream=Terminal())) is JsonLines
    assert type(choose_progress(as_json=False, plain=False, stream=Terminal())) is LiveLines
    assert type(choose_progress(as_json=False, plain=True, stream=Terminal())) is PlainLines
    assert type(choose_progress(as_json=False, plain=False, stream=io.StringIO())) is PlainLines
