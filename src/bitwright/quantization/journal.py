"""The record of what a run has finished, written so that a kill loses no more than what waits to be written.

The work directory lies inside the output directory and holds ``journal.jsonl``: a header line with the fingerprint of
the run, then a line for each finished unit. A unit's files are on disk under their final names before its line is.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import WORK_DIRECTORY, WORK_JOURNAL
from bitwright.formats.storage import append_line, file_sha256, make_directory, remove_file, write_file

__all__ = ["Journal", "UnitRecord", "has_units", "recorded_files"]

SHOWN = 5  # differences named in a refusal
SHOWN_LENGTH, SHOWN_BEFORE = 120, 40  # characters of a value in it, and of them before the place that differs


@dataclass(frozen=True, slots=True, kw_only=True)
class UnitRecord:
    """One finished unit.

    Attributes:
        unit: its name.
        file: the shard's name in the output directory, and its ``sha256``.
        tensors: bytes of each tensor in the shard.
        layers: the report's rows for the layers quantized in it.
        inputs: the file in the work directory with the next block's inputs, and its hash; calibrated runs only.
        output_error: relative squared error of the block's output; calibrated runs only.
        dropped: numbers of calibration samples that were left out from this unit on.
        seconds: that the unit took.
    """

    unit: str
    file: str
    sha256: str
    tensors: Mapping[str, int]
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    inputs: tuple[str, str] | None = None
    output_error: float | None = None
    dropped: tuple[int, ...] = ()
    seconds: float = 0.0


class Journal:
    """The journal of one output directory. ``done`` are the units that are finished and whose files are intact."""

    def __init__(
        self,
        output: Path,
        fingerprint: Mapping[str, Any],
        command: str,
        units: Sequence[str],
        *,
        shards: Path | None = None,
    ) -> None:
        """A journal that is not open yet.

        Args:
            fingerprint: of the run (JSON-ready).
            command: resumes it.
            units: their names, in order.
            shards: where their files are; in ``output`` unless given.
        """
        self.output, self.work = output, output / WORK_DIRECTORY
        self.shards = shards or output
        self._units = tuple(units)
        self._path = self.work / WORK_JOURNAL
        self._fingerprint: dict[str, Any] = json.loads(json.dumps(fingerprint))
        self._command = command
        self.done: list[UnitRecord] = []

    def open(self, *, anew: bool = False) -> None:
        """Start a journal, or read the one that is there, unless ``anew``, and check every file that it names.

        Raises:
            BitwrightError: BW207 if the journal belongs to a run with other settings, naming what differs.
        """
        make_directory(self.work)
        lines = [] if anew else _complete_lines(self._path)
        if not lines:
            self._write([])
            return
        header = lines[0]
        differing = _differences(header.get("fingerprint", {}), self._fingerprint)
        if differing:
            command = header.get("command", "the first command")
            shown, more = list(differing)[:SHOWN], len(differing) - SHOWN
            values = [f"{name}: {differing[name][0]} there, {differing[name][1]} now" for name in shown]
            raise BitwrightError(
                "BW207",
                f"{self.output} holds an unfinished run with another {', '.join(shown)}",
                why="; ".join(values) + (f"; and {more} more" if more > 0 else ""),
                suggestion=f"resume it with: {command}; or discard it with --restart",
            )
        self.done = self._intact(lines[1:])
        self._write(self.done)  # drops a line cut short by a kill, and lines whose files are damaged

    def append(self, record: UnitRecord) -> None:
        """Note a finished unit; the inputs of the block before it are no longer needed and are removed."""
        append_line(self._path, json.dumps(asdict(record), sort_keys=True))
        previous = self.done[-1].inputs if self.done else None
        self.done.append(record)
        if previous is not None and previous != record.inputs:
            remove_file(self.work / previous[0])

    def _write(self, records: list[UnitRecord]) -> None:
        lines = [{"fingerprint": self._fingerprint, "command": self._command}, *map(asdict, records)]
        write_file(self._path, [(json.dumps(line, sort_keys=True) + "\n").encode() for line in lines])

    def _intact(self, lines: list[dict[str, Any]]) -> list[UnitRecord]:
        """The leading records whose shards are as they were written, and which can be continued from."""
        intact: list[UnitRecord] = []
        for line, unit in zip(lines, self._units, strict=False):
            record = _record(line)
            if record is None or record.unit != unit or not _is_file_with(self.shards / record.file, record.sha256):
                break
            intact.append(record)
        # Only the last unit's inputs are kept. If a shard before it is damaged, a calibrated run starts over.
        while intact and intact[-1].inputs is not None:
            name, sha256 = intact[-1].inputs
            if _is_file_with(self.work / name, sha256):
                break
            intact.pop()
        return intact


def has_units(output: Path) -> bool:
    """Whether an unfinished run in ``output`` has anything to resume."""
    return len(_complete_lines(output / WORK_DIRECTORY / WORK_JOURNAL)) > 1


def recorded_files(output: Path) -> frozenset[str]:
    """The files of all units that the journal in ``output`` has."""
    records = map(_record, _complete_lines(output / WORK_DIRECTORY / WORK_JOURNAL)[1:])
    return frozenset(record.file for record in records if record is not None)


def _complete_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a journal up to the first that was cut short or damaged."""
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    for line in path.read_bytes().split(b"\n")[:-1]:  # without its line end a line was cut short
        try:
            record = json.loads(line)
        except ValueError:
            break
        if not isinstance(record, dict):
            break
        lines.append(record)
    return lines


def _is_file_with(path: Path, sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == sha256


def _record(line: Mapping[str, Any]) -> UnitRecord | None:
    """A line as a record; ``None`` if it is not one (a journal is read after any accident)."""
    values = dict(line)
    try:
        values["inputs"] = tuple(values["inputs"]) if values.get("inputs") else None
        values["dropped"] = tuple(values.get("dropped", ()))
        return UnitRecord(**values)
    except TypeError:
        return None


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The fields in which two fingerprints differ, by dotted name, and both values, shortened for a message."""
    before, after = dict(_fields(old, "")), dict(_fields(new, ""))
    return {
        name: _shorten(before.get(name), after.get(name))
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    }


def _fields(value: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, item in value.items():
        if isinstance(item, dict) and item:
            yield from _fields(item, f"{prefix}{name}.")
        else:
            yield prefix + name, item


def _shorten(old: object, new: object) -> tuple[str, str]:
    """Both as text, long ones from the same place, shortly before the one where they differ."""
    texts = [json.dumps(value, sort_keys=True, ensure_ascii=False) for value in (old, new)]
    shorter, longer = sorted(map(len, texts))
    differs = next((place for place in range(shorter) if texts[0][place] != texts[1][place]), shorter)
    start = max(0, min(differs - SHOWN_BEFORE, longer - SHOWN_LENGTH))
    return _cut(texts[0], start), _cut(texts[1], start)


def _cut(text: str, start: int) -> str:
    end = start + SHOWN_LENGTH
    return ("..." if start else "") + text[start:end] + ("..." if end < len(text) else "")
