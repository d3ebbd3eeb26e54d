"""The sha256 of the files of a checkpoint (not of its report and card), written beside them and verified on demand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitwright.core.errors import BitwrightError
from bitwright.formats.directory import find_file, read_object
from bitwright.formats.storage import file_sha256

__all__ = ["CHECKSUMS", "listed_files", "serialize_checksums", "verify_files"]

CHECKSUMS = "bitwright_files.json"
VERSION = 1
LIMIT = 4 << 20
DIGEST = re.compile(r"[0-9a-f]{64}")


def serialize_checksums(hashes: Mapping[str, str]) -> bytes:
    """The contents of ``bitwright_files.json``, from the sha256 (hexadecimal) of each file by its name."""
    record = {"version": VERSION, "sha256": dict(sorted(hashes.items()))}
    return (json.dumps(record, indent=1) + "\n").encode()


def listed_files(directory: Path) -> frozenset[str]:
    """The names of the files that bitwright wrote to ``directory``; none where its list is missing or unreadable."""
    try:
        record = json.loads((directory / CHECKSUMS).read_bytes())
        return frozenset(_checked(directory / CHECKSUMS, record))
    except (OSError, ValueError, AttributeError, RecursionError, BitwrightError):
        return frozenset()


def verify_files(directory: Path) -> tuple[str, ...]:
    """Compare every file that ``bitwright_files.json`` lists with its sha256; return their names (none without a list).

    Raises:
        BitwrightError: BW303 if a file is missing, BW310 for an unsafe name, BW314 naming the first file that differs.
    """
    path = find_file(directory, CHECKSUMS)
    if path is None:
        return ()
    hashes = _checked(path, read_object(path, code="BW314", limit=LIMIT))
    for name, expected in hashes.items():
        file = find_file(directory, name)
        if file is None or not file.is_file():
            what = f"{name} is missing"
            raise BitwrightError("BW303", what, where=str(directory), suggestion="fetch this file again")
        actual = _digest(file)
        if actual != expected:
            raise BitwrightError(
                "BW314",
                f"{name} is not what was written",
                where=str(file),
                why=f"its sha256 is {actual}, not {expected}",
                suggestion="copy this file again from where the checkpoint was made",
            )
    return tuple(hashes)


def _digest(file: Path) -> str:
    try:
        return file_sha256(file)
    except OSError as error:
        what, suggestion = f"{file.name} cannot be read: {error.strerror}", "make it readable, or fetch this file again"
        raise BitwrightError("BW303", what, where=str(file), suggestion=suggestion) from error


def _checked(path: Path, record: dict[str, Any]) -> dict[str, str]:
    version, hashes = record.get("version"), record.get("sha256")
    if version != VERSION:
        what = f"{path.name} is of version {str(version)[:40]}; this bitwright reads version {VERSION}"
        suggestion = "use the version of bitwright that wrote it, or a newer one"
        raise BitwrightError("BW311", what, where=str(path), suggestion=suggestion)
    is_valid = isinstance(hashes, dict) and all(isinstance(h, str) and DIGEST.fullmatch(h) for h in hashes.values())
    if not isinstance(hashes, dict) or not is_valid:
        what = f"{path.name} is not a list of sha256 sums"
        raise BitwrightError("BW314", what, where=str(path), suggestion="copy this file again")
    return hashes
