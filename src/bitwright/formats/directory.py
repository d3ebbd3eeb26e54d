"""Reading the files of a model directory that somebody else may have made: no escape from it, no unbounded parse."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from bitwright.core.errors import BitwrightError

__all__ = ["find_file", "locate_file", "read_object"]


def find_file(directory: Path, name: str) -> Path | None:
    """The path of the file ``name`` of ``directory``, or ``None`` if there is none.

    Raises:
        BitwrightError: BW310 if the name is not a plain file name or leads, through links, outside the directory.
    """
    path = locate_file(directory, name)
    return path if path.exists() else None


def locate_file(directory: Path, name: str) -> Path:
    """The path of ``name`` in ``directory``, whether or not it exists.

    A link may point at another file of the directory or, in the cache of the hub, at ``blobs`` beside ``snapshots``.

    Raises:
        BitwrightError: BW310 if the name is not a plain file name or leads, through links, outside the directory.
    """
    is_plain = name not in ("", ".", "..") and not {"/", "\\", "\0", ":"} & set(name) and name.isprintable()
    if not is_plain or len(os.fsencode(name)) > 255:
        raise BitwrightError(
            "BW310",
            f"{name[:200]!r} is not a plain file name",
            where=str(directory),
            why="files of a model must lie in its own directory",
            suggestion="fetch the model again from a source that you trust",
        )
    path = directory / name
    if path.is_symlink():
        _check_link(directory, path)
    return path


def _check_link(directory: Path, path: Path) -> None:
    try:
        home = directory.resolve(strict=True)
        target = path.resolve(strict=False)
    except (OSError, RuntimeError) as error:
        what = f"the link {path.name} leads nowhere: {error}"
        suggestion = "replace the link by the file itself, if it is meant to be there"
        raise BitwrightError("BW310", what, where=str(path), suggestion=suggestion) from error
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    if not any(target.is_relative_to(root) for root in allowed):
        raise BitwrightError(
            "BW310",
            f"{path.name} is a link to {target}, outside the model directory",
            where=str(path),
            why="a link in a downloaded model could point at any file of yours",
            suggestion="replace the link by the file itself, if it is meant to be there",
        )


def read_object(path: Path, *, code: str, limit: int) -> dict[str, Any]:
    """The JSON object in a file of at most ``limit`` bytes.

    Raises:
        BitwrightError: ``code``, if it is not a regular file, too large, not UTF-8, not JSON, nested without measure,
            has a name twice or a number of thousands of digits, or is not an object.
    """
    try:
        value = json.loads(_read_bytes(path, limit), object_pairs_hook=_unique)
    except RecursionError as error:
        raise _refusal(path, code, "it is nested too deeply") from error
    except OSError as error:
        raise _refusal(path, code, error.strerror or str(error)) from error
    except ValueError as error:
        raise _refusal(path, code, str(error)) from error
    if not isinstance(value, dict):
        raise _refusal(path, code, f"it holds a {type(value).__name__}, not an object")
    return value


def _read_bytes(path: Path, limit: int) -> bytes:
    # Without O_NONBLOCK a named pipe would wait here for a writer.
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        if status.st_size > limit:
            raise ValueError(f"it has {status.st_size} bytes; at most {limit} are read")
        return os.pread(descriptor, limit, 0)
    finally:
        os.close(descriptor)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice[:80]!r} occurs twice in one object")
    return record


def _refusal(path: Path, code: str, reason: str) -> BitwrightError:
    return BitwrightError(
        code,
        f"{path.name} cannot be read: {reason}",
        where=str(path),
        suggestion="fetch this file again",
    )
