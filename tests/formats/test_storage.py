"""Files appear whole or not at all, whichever system call fails; a directory has one writer at a time."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from bitwright.core.errors import BitwrightError
from bitwright.formats.storage import (
    append_line,
    file_sha256,
    lock_directory,
    make_directory,
    remove_file,
    remove_tree,
    write_file,
)

CONTENT = b"first second third"
CALLS = ("open", "write", "fsync", "replace", "mkdir", "unlink", "ftruncate", "pread")


class Fault:
    """Makes the ``k``-th call to any of ``CALLS`` fail (and, with ``lasting``, every one after it)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, k: int, number: int, *, lasting: bool = False) -> None:
        self.calls, self.names = 0, []
        for name in CALLS:
            monkeypatch.setattr(os, name, self._failing(name, getattr(os, name), k, number, lasting))

    def _failing(self, name: str, call: Callable[..., Any], k: int, number: int, lasting: bool) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            self.names.append(name)
            if self.calls == k or (lasting and self.calls > k):
                raise OSError(number, os.strerror(number))
            return call(*arguments, **options)

        return run


def _calls_of(monkeypatch: pytest.MonkeyPatch, action: Callable[[], Any]) -> int:
    with monkeypatch.context() as patch:
        shim = Fault(patch, 0, errno.EIO)
        action()
        return shim.calls


def _chunks() -> Iterator[bytes | memoryview]:
    yield b"first "
    yield memoryview(b"second ")
    yield b""
    yield memoryview(bytearray(b"third"))


def test_a_file_is_written_and_its_hash_returned(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    assert write_file(path, _chunks()) == hashlib.sha256(CONTENT).hexdigest() == file_sha256(path)
    assert path.read_bytes() == CONTENT
    assert write_file(path, [b"other"]) == file_sha256(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_bytes_are_safe_before_they_get_their_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def note_fsync(descriptor: int) -> None:
        calls.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(os, "replace", lambda *paths: calls.append("rename") or replace(*paths))
    write_file(tmp_path / "a.bin", _chunks())
    assert calls == ["file", "rename", "directory"]


@pytest.mark.parametrize(
    ("before", "number", "lasting"),
    [
        (None, errno.ENOSPC, False),
        (b"old", errno.EIO, False),
        (None, errno.EACCES, True),
        (b"old", errno.ENOSPC, True),
    ],
)
def test_whichever_call_fails_the_name_holds_old_or_new_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes | None, number: int, lasting: bool
) -> None:
    path = tmp_path / "a.bin"
    count = _calls_of(monkeypatch, lambda: write_file(path, _chunks()))
    assert count >= 8  # open, three writes, fsync, replace, open and fsync of the directory; and unlink
    for k in range(1, count + 1):
        path.unlink(missing_ok=True)
        if before is not None:
            path.write_bytes(before)
        with monkeypatch.context() as patch:
            shim = Fault(patch, k, number, lasting=lasting)
            with pytest.raises(BitwrightError) as caught:
                write_file(path, _chunks())
        assert caught.value.code == "BW501" and "a.bin" in str(caught.value)
        assert ("GB" in caught.value.suggestion) == (number == errno.ENOSPC)
        content = path.read_bytes() if path.exists() else None
        assert content in (before, CONTENT), shim.names
        if not lasting:  # a temporary file that cannot even be removed is left, under its own name
            assert {entry.name for entry in tmp_path.iterdir()} <= {"a.bin"}, shim.names
        assert write_file(path, _chunks()) == file_sha256(path)
        assert [entry.name for entry in tmp_path.iterdir()] == ["a.bin"]


def test_large_chunks_are_hashed_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = [bytes([number]) * (size << 10) for number, size in enumerate([3000, 1, 1024, 5, 2048])]
    digest = write_file(tmp_path / "a", iter(chunks))
    assert digest == hashlib.sha256(b"".join(chunks)).hexdigest() == file_sha256(tmp_path / "a")
    Fault(monkeypatch, 3, errno.EIO)  # the first write, its bytes being hashed
    with pytest.raises(BitwrightError, match="BW501"):
        write_file(tmp_path / "b", iter(chunks))
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, bytes(data[:3])))
    write_file(tmp_path / "a", [b"0123456789"])
    append_line(tmp_path / "b", "0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789" and (tmp_path / "b").read_bytes() == b"0123456789\n"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("bad"), BitwrightError("BW602", "no")])
def test_a_source_that_fails_leaves_nothing_and_says_so_itself(tmp_path: Path, error: BaseException) -> None:
    def chunks() -> Iterator[bytes]:
        yield b"some"
        raise error

    with pytest.raises(type(error)):
        write_file(tmp_path / "a", chunks())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_with_the_room_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**10, 5 * 10**9, 5 * 10**9))
    Fault(monkeypatch, 3, errno.ENOSPC)
    with pytest.raises(BitwrightError, match=r"free 2\.001 GB or more and run the same command again") as caught:
        write_file(tmp_path / "a", _chunks(), size=7 * 10**9 + 1)
    assert caught.value.where == str(tmp_path / "a")
    assert caught.value.why == "it takes 7000000001 bytes or more, and 5000000000 are free on its disk"


def test_of_a_quota_the_free_space_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**13, 0, 10**13))
    Fault(monkeypatch, 3, errno.EDQUOT)
    with pytest.raises(BitwrightError, match=r"free 7\.001 GB or more"):
        write_file(tmp_path / "a", _chunks(), size=7 * 10**9 + 1)


def test_a_temporary_name_that_is_a_link_is_not_written_through(tmp_path: Path) -> None:
    target = tmp_path / "precious"
    target.write_bytes(b"keep")
    (tmp_path / ".a.tmp").symlink_to(target)
    write_file(tmp_path / "a", [b"new"])
    assert target.read_bytes() == b"keep" and (tmp_path / "a").read_bytes() == b"new"
    assert not (tmp_path / "a").is_symlink()


def test_lines_are_appended(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    append_line(path, "one")
    append_line(path, '{"two": "zwei ü"}')
    assert path.read_text(encoding="utf-8") == 'one\n{"two": "zwei ü"}\n'
    for line in ("a\nb", "a\rb"):
        with pytest.raises(ValueError, match="one line"):
            append_line(path, line)


def test_a_torn_last_line_does_not_swallow_the_next(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b"one\n{torn")
    append_line(path, "two")
    assert path.read_bytes() == b"one\n{torn\ntwo\n"


@pytest.mark.parametrize("before", [b"", b"one\n", b"one\n{torn"])
def test_whichever_call_fails_a_journal_keeps_its_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes
) -> None:
    path = tmp_path / "journal"
    path.write_bytes(before)
    count = _calls_of(monkeypatch, lambda: append_line(path, "two"))
    for k in range(1, count + 1):
        path.write_bytes(before)
        with monkeypatch.context() as patch:
            Fault(patch, k, errno.ENOSPC)
            with pytest.raises(BitwrightError, match="BW501"):
                append_line(path, "two")
        assert path.read_bytes() == before


def test_a_partly_written_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal"
    path.write_bytes(b"one\n")
    write, calls = os.write, []

    def short(descriptor: int, data: memoryview) -> int:
        calls.append(1)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "full")
        return write(descriptor, bytes(data[:2]))

    monkeypatch.setattr(os, "write", short)
    with pytest.raises(BitwrightError, match="BW501"):
        append_line(path, "two")
    assert path.read_bytes() == b"one\n"


def test_directories_are_made_with_their_parents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_directory(tmp_path / "a" / "b")
    make_directory(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir()
    (tmp_path / "file").write_bytes(b"")
    for taken in (tmp_path / "file", tmp_path / "file" / "c"):
        with pytest.raises(BitwrightError, match="BW501") as caught:
            make_directory(taken)
        assert caught.value.where == str(tmp_path / "file")  # what is in the way, not what was wanted
    count = _calls_of(monkeypatch, lambda: make_directory(tmp_path / "x" / "y"))
    remove_tree(tmp_path / "x")
    for k in range(1, count + 1):
        with monkeypatch.context() as patch:
            Fault(patch, k, errno.ENOSPC)
            with pytest.raises(BitwrightError, match="BW501"):
                make_directory(tmp_path / "x" / "y")
        make_directory(tmp_path / "x" / "y")
        remove_tree(tmp_path / "x")


def test_removing_follows_no_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep").write_bytes(b"x")
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "link").symlink_to(outside)
    (tmp_path / "alias").symlink_to(outside)
    remove_tree(tree)
    remove_tree(tmp_path / "alias")
    remove_tree(tmp_path / "absent")
    (tmp_path / "link").symlink_to(outside / "keep")
    remove_file(tmp_path / "link")
    remove_file(tmp_path / "absent")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["outside"] and (outside / "keep").exists()
    with pytest.raises(BitwrightError, match="BW501"):
        remove_file(outside)


def test_the_second_writer_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    with lock_directory(tmp_path):
        record = json.loads((tmp_path / "lock").read_bytes())
        assert record["pid"] == os.getpid() and set(record) == {"pid", "host", "since"}
        with pytest.raises(BitwrightError) as caught, lock_directory(tmp_path):
            raise AssertionError("locked twice")
        message = str(caught.value)
        assert caught.value.code == "BW502" and caught.value.exit_status == 5
        assert f"pid {os.getpid()} on host {record['host']} since {record['since']}" in message
    assert not (tmp_path / "lock").exists()
    with lock_directory(tmp_path):
        pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"pid": "x"}', b"[" * 100_000])
def test_an_unreadable_holder_is_another_process(tmp_path: Path, content: bytes) -> None:
    with lock_directory(tmp_path):
        (tmp_path / "lock").write_bytes(content)
        with pytest.raises(BitwrightError, match="locked by another process"), lock_directory(tmp_path):
            raise AssertionError("locked twice")


HOLD = textwrap.dedent(
    """
    import sys, time
    from pathlib import Path
    from bitwright.formats.storage import lock_directory
    with lock_directory(Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(60)
    """
)


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(BitwrightError, match=f"pid {holder.pid} "), lock_directory(tmp_path):
            raise AssertionError("locked twice")
    finally:
        holder.kill()
        holder.wait()
        if holder.stdout is not None:
            holder.stdout.close()
    assert (tmp_path / "lock").exists()
    with lock_directory(tmp_path):
        assert json.loads((tmp_path / "lock").read_bytes())["pid"] == os.getpid()


def test_whichever_call_fails_no_lock_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lock() -> None:
        with lock_directory(tmp_path):
            pass

    for k in range(1, _calls_of(monkeypatch, lock) + 1):
        with monkeypatch.context() as patch:
            shim = Fault(patch, k, errno.EIO)
            try:
                lock()
                code = ""
            except BitwrightError as error:
                code = error.code
        # If the lock file cannot be removed, it stays; nobody holds it.
        assert code == ("" if shim.names[k - 1] == "unlink" else "BW501")
        lock()
        assert not (tmp_path / "lock").exists()


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_bytes(b"keep")
    (tmp_path / "lock").symlink_to(tmp_path / "precious")
    with pytest.raises(BitwrightError, match="BW501"), lock_directory(tmp_path):
        raise AssertionError("locked a link")
    assert (tmp_path / "precious").read_bytes() == b"keep"


def test_a_lock_that_its_holder_removes_just_now_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first file that is locked is gone from the directory by then: locking it would lock nothing."""
    flock, calls = fcntl.flock, []

    def race(descriptor: int, operation: int) -> None:
        if not calls:
            os.unlink(tmp_path / "lock")
        calls.append(operation)
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", race)
    with lock_directory(tmp_path):
        assert len(calls) == 2 and json.loads((tmp_path / "lock").read_bytes())["pid"] == os.getpid()
        with pytest.raises(BitwrightError, match="BW502"), lock_directory(tmp_path):
            raise AssertionError("locked twice")


def test_where_locks_do_not_exist_the_reason_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(BitwrightError, match=r"BW501.*No locks available"), lock_directory(tmp_path):
        raise AssertionError("locked without locks")


def test_a_tree_that_cannot_be_removed_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tree" / "sub").mkdir(parents=True)

    def refuse(*arguments: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(os, "rmdir", refuse)
    with pytest.raises(BitwrightError, match=r"BW501.*tree"):
        remove_tree(tmp_path / "tree")
