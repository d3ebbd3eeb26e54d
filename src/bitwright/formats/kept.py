"""Folders of what can be made again: entries that were used longest ago are removed, so that all stay within a limit.

An entry is a file or a directory. Whoever works in a directory holds a shared lock on it, which the kernel drops with
the process, and no process removes what is held. Files need no lock: what is open or mapped stays readable when it is
removed. One process at a time makes room in a folder. On a disk without locks, whoever finds nothing makes it anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import weakref
from collections.abc import Iterator
from pathlib import Path

from bitwright.core.errors import BitwrightError
from bitwright.formats.storage import make_directory, remove_tree, renew_time

__all__ = ["Hold", "hold_directory", "make_room", "note_use"]

SAFETY = 1.1  # of free disk space over what is needed


class Hold:
    """The directory ``path``, which nobody removes for as long as this lives."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(self._descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def discard(self) -> None:
        """Let go of the directory, and remove it unless another process works in it."""
        with _alone(self.path.parent):
            self._close()
            _remove(self.path)


def hold_directory(folder: Path, name: str, *, size: int, limit: int) -> Hold:
    """The directory of ``name`` in ``folder``, made if it is missing, with room for ``size`` bytes.

    Other entries are removed, those used longest ago first, until there is room within ``limit`` for all that this one
    may come to hold: its size is part of its name.

    Raises:
        BitwrightError: BW501 if it has no room within the limit or on the disk, or cannot be made.
    """
    path = folder / f"{name}.{size}"
    if size <= limit:
        make_directory(folder)
    with _alone(folder):
        others = _shrink(folder, "*", allowed=max(0, limit - size), keep=path)[0]
        if size + others > limit:
            used = f", of which {others / 1e9:.2f} are in use" if others else ""
            what = f"{size / 1e9:.2f} GB are more than BITWRIGHT_CACHE_LIMIT leaves, {limit / 1e9:.2f} GB{used}"
            raise BitwrightError("BW501", what, where=str(folder), suggestion="a higher BITWRIGHT_CACHE_LIMIT")
        if path.is_dir():
            note_use(path)
        else:
            _check_disk(folder, size)
            make_directory(path)
        return Hold(path)


def make_room(folder: Path, pattern: str, *, allowed: int, keep: Path) -> int:
    """Remove what matches ``pattern``, used longest ago first, until all but ``keep`` takes at most ``allowed`` bytes.

    Returns:
        How many entries were removed. What another process holds, or what cannot be removed, stays.
    """
    with _alone(folder):
        return _shrink(folder, pattern, allowed=allowed, keep=keep)[1]


def note_use(entry: Path) -> None:
    """Let an entry be the last to be removed; whoever may only read it uses it all the same."""
    with contextlib.suppress(BitwrightError):
        renew_time(entry)


def _check_disk(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < SAFETY * size:
        what = f"{SAFETY * size / 1e9:.2f} GB are needed, and {free / 1e9:.2f} GB are free"
        raise BitwrightError("BW501", what, where=str(folder), suggestion="free disk space, or set BITWRIGHT_CACHE")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Wait until no other process makes room in ``folder``."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:  # not there, or not to be read: then nothing in it is removed, either
        yield
        return
    try:
        with contextlib.suppress(OSError):  # a disk without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _shrink(folder: Path, pattern: str, *, allowed: int, keep: Path) -> tuple[int, int]:
    """The bytes that all but ``keep`` take in the end, and how many entries were removed."""
    entries = []
    for entry in folder.glob(pattern):
        with contextlib.suppress(OSError):  # gone by now
            if entry != keep and not entry.is_symlink():
                entries.append((entry.stat().st_mtime_ns, entry, _size(entry)))
    total, removed = sum(size for _, _, size in entries), 0
    for _, entry, size in sorted(entries):
        if total <= allowed:
            break
        if _remove(entry):
            total, removed = total - size, removed + 1
    return total, removed


def _size(entry: Path) -> int:
    """What an entry takes, or will take."""
    if not entry.is_dir():
        return entry.stat().st_size
    planned = entry.name.rpartition(".")[2]
    taken = 0
    for file in entry.iterdir():
        with contextlib.suppress(OSError):
            taken += file.lstat().st_size
    return max(taken, int(planned) if planned.isdecimal() else 0)


def _remove(entry: Path) -> bool:
    """Remove an entry that nobody holds."""
    try:
        descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        with contextlib.suppress(OSError):  # a disk without locks
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
        remove_tree(entry)
    except BitwrightError:
        return False
    finally:
        os.close(descriptor)
    return True
