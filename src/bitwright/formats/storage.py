"""The only module that writes files: whole files appear at once under their name, or not at all.

Every system call goes through the ``os`` module and is looked up when it is made, so that a test can make call k fail.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bitwright.core.errors import BitwrightError

__all__ = [
    "append_line",
    "file_sha256",
    "lock_directory",
    "make_directory",
    "move_file",
    "remove_empty_directory",
    "remove_file",
    "remove_tree",
    "renew_time",
    "write_file",
]

LOCK_NAME = "lock"
LARGE = 1 << 20  # bytes that are worth handing to another thread


def write_file(path: Path, chunks: Iterable[bytes | memoryview], *, size: int | None = None) -> str:
    """Write ``chunks`` to ``path`` durably and atomically; return the sha256 of the bytes, in hexadecimal.

    The bytes go to ``.NAME.tmp`` beside it, which is synchronized and then renamed, so ``path`` holds what it held
    before or all of the new bytes. ``size``, where known, lets a full disk be reported with the room that is missing.

    Raises:
        BitwrightError: BW501 if any call fails; the temporary file is removed first.
    """
    temporary = path.parent / f".{path.name}.tmp"
    digest = hashlib.sha256()
    written = 0
    try:
        # A name that is already taken, by a link for instance, is not written through.
        _remove_if_present(temporary)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            with ThreadPoolExecutor(max_workers=1) as hasher:
                for chunk in chunks:
                    view = memoryview(chunk).cast("B") if len(chunk) else memoryview(b"")
                    written += view.nbytes
                    # Hashed while they are written: either takes about as long, and neither holds Python's lock.
                    hashing = hasher.submit(digest.update, view) if view.nbytes >= LARGE else None
                    _write_all(descriptor, view)
                    digest.update(view) if hashing is None else hashing.result()
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
        _sync_directory(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            _remove_if_present(temporary)
        if isinstance(error, OSError):
            raise _write_error(path, error, max(written, size or 0)) from error
        raise
    return digest.hexdigest()


def append_line(path: Path, line: str) -> None:
    """Append one line (without its end) to ``path`` and synchronize it; on failure the file is as long as before.

    A last line that an earlier crash left without its end is ended first, so that it cannot swallow this one.

    Raises:
        ValueError: if ``line`` holds a line break.
        BitwrightError: BW501 if any call fails.
    """
    if "\n" in line or "\r" in line:
        raise ValueError("one line at a time")
    try:
        is_new = not path.exists()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            length = os.fstat(descriptor).st_size
            torn = length > 0 and os.pread(descriptor, 1, length - 1) != b"\n"
            try:
                _write_all(descriptor, memoryview((("\n" if torn else "") + line + "\n").encode()))
                os.fsync(descriptor)
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(descriptor, length)
                raise
        finally:
            os.close(descriptor)
        if is_new:
            _sync_directory(path.parent)
    except OSError as error:
        raise _write_error(path, error, len(line)) from error


def make_directory(path: Path) -> None:
    """Create ``path`` and its missing parents; one that exists is left as it is.

    Raises:
        BitwrightError: BW501 if a directory cannot be made, or the name is taken by something else.
    """
    try:
        missing = []
        while not path.is_dir():
            missing.append(path)
            path = path.parent
        for path in reversed(missing):
            try:
                os.mkdir(path)
            except FileExistsError:  # another process made it just now
                if not path.is_dir():
                    raise
            _sync_directory(path.parent)
    except OSError as error:
        raise _write_error(path, error, 0) from error  # the one that failed, not the last that was wanted


def renew_time(path: Path) -> None:
    """Set the time of a file or directory to now, as if it had just been written.

    Raises:
        BitwrightError: BW501 if that is not allowed, or it is not there.
    """
    try:
        os.utime(path)
    except OSError as error:
        raise _write_error(path, error, 0) from error


def move_file(source: Path, target: Path) -> None:
    """Give a file another name, on the same disk, in place of whatever file has that name; after a crash it has one.

    Raises:
        BitwrightError: BW501 if any call fails.
    """
    try:
        os.replace(source, target)
        _sync_directory(target.parent)
        _sync_directory(source.parent)
    except OSError as error:
        raise _write_error(target, error, 0) from error


def remove_file(path: Path) -> None:
    """Remove a file or a link (not what it points to), if it is there.

    Raises:
        BitwrightError: BW501 if it cannot be removed.
    """
    try:
        _remove_if_present(path)
    except OSError as error:
        raise _write_error(path, error, 0) from error


def remove_tree(path: Path) -> None:
    """Remove a directory and all in it, if it is there; a link is removed, not followed.

    Raises:
        BitwrightError: BW501 if something cannot be removed.
    """
    try:
        if path.is_symlink() or not path.is_dir():
            _remove_if_present(path)
        else:
            shutil.rmtree(path)
    except OSError as error:
        raise _write_error(path, error, 0) from error


def remove_empty_directory(path: Path) -> None:
    """Remove a directory that is there and empty; leave any other as it is."""
    with contextlib.suppress(OSError):
        os.rmdir(path)


@contextlib.contextmanager
def lock_directory(path: Path) -> Iterator[None]:
    """Hold the one lock of the directory ``path`` (the file ``lock`` in it) for as long as the context lasts.

    The kernel drops the lock with the process that holds it, however that ends, so a file left behind locks nothing.

    Raises:
        BitwrightError: BW502 naming the holder, BW501 if the lock file cannot be written.
    """
    lock = path / LOCK_NAME
    descriptor = _acquire(lock)
    try:
        try:
            holder = {"pid": os.getpid(), "host": socket.gethostname(), "since": _now()}
            os.ftruncate(descriptor, 0)
            _write_all(descriptor, memoryview(json.dumps(holder).encode()))
        except OSError as error:
            raise _write_error(lock, error, 0) from error
        yield
    finally:
        with contextlib.suppress(OSError):
            os.unlink(lock)  # while it is still held: whoever waits for this file finds it gone and makes a new one
        os.close(descriptor)


def file_sha256(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal.

    Raises:
        OSError: if it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _acquire(lock: Path) -> int:
    """Open and lock the file, again if the last holder removed it in between."""
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        except OSError as error:
            raise _write_error(lock, error, 0) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            mine = os.fstat(descriptor)
            if mine.st_nlink and os.path.samestat(mine, os.stat(lock)):
                return descriptor
        except FileNotFoundError:
            pass
        except OSError as error:
            holder = _describe_holder(descriptor)
            os.close(descriptor)
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise _write_error(lock, error, 0) from error
            raise BitwrightError(
                "BW502",
                f"{lock.parent} is locked by {holder}",
                where=str(lock),
                why="two runs on one output would mix their files",
                suggestion="wait for the other run, stop it, or choose another output directory",
            ) from error
        os.close(descriptor)


def _describe_holder(descriptor: int) -> str:
    """Who holds the lock, from what they wrote in it (which may be nothing yet)."""
    try:
        record = json.loads(os.pread(descriptor, 4096, 0))
        return f"pid {int(record['pid'])} on host {str(record['host'])[:100]} since {str(record['since'])[:40]}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")


def _write_all(descriptor: int, view: memoryview) -> None:
    """Write every byte; one call may take fewer (Linux takes 2 GiB at most)."""
    while view.nbytes:
        view = view[os.write(descriptor, view) :]


def _sync_directory(path: Path) -> None:
    """Make a rename in ``path`` survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove_if_present(path: Path) -> None:
    try:
        os.unlink(path)
    except FileNotFoundError:
        return
    except (IsADirectoryError, PermissionError):
        if not stat.S_ISDIR(os.lstat(path).st_mode):
            raise
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path)) from None


def _write_error(path: Path, error: OSError, needed: int) -> BitwrightError:
    """BW501; where the disk is full, with what is ``needed``, as far as that is known, and the room that is missing."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    suggestion, why = "make the directory writable, or choose another one, and run the same command again", ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = 0
        with contextlib.suppress(OSError):
            free = shutil.disk_usage(path.parent).free
        missing = max(needed if error.errno == errno.EDQUOT else needed - free, 1 << 20)
        why = (
            f"it takes {needed} bytes or more, and {free} are free on its disk" if needed else f"{free} bytes are free"
        )
        suggestion = f"free {math.ceil(missing / 1e6) / 1000:.3f} GB or more and run the same command again"
    what = f"cannot write {path.name}: {reason}"
    return BitwrightError("BW501", what, where=str(path), why=why, suggestion=suggestion)
