"""Folders of what can be made again: within their limit, without what is in use, by several processes at once."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bitwright.core.errors import BitwrightError
from bitwright.formats import kept
from bitwright.formats.kept import Hold, hold_directory, make_room, note_use

HOLDER = """
import sys
from pathlib import Path
from bitwright.formats.kept import hold_directory
hold = hold_directory(Path(sys.argv[1]), sys.argv[2], size=int(sys.argv[3]), limit=int(sys.argv[4]))
print(hold.path.name, flush=True)
sys.stdin.read()
"""
RACER = """
import random, sys
from pathlib import Path
from bitwright.core.errors import BitwrightError
from bitwright.formats.kept import _alone, hold_directory

def taken(folder):
    with _alone(folder):  # so that none goes and none comes while they are counted
        return sum(file.stat().st_size for file in folder.glob("*/data"))

folder, chance = Path(sys.argv[1]), random.Random(int(sys.argv[2]))
for turn in range(60):
    try:
        hold = hold_directory(folder, f"k{chance.randrange(9)}", size=40, limit=100)
    except BitwrightError:
        continue  # the other process holds two
    (hold.path / "data").write_bytes(b"x" * 40)
    assert taken(folder) <= 100 and (hold.path / "data").exists()
    del hold
"""


def entry(folder: Path, name: str, size: int, age: int) -> Path:
    """A directory with a file of ``size`` bytes, last used ``age`` seconds after a time long ago."""
    path = folder / name
    path.mkdir(parents=True)
    (path / "data").write_bytes(b"x" * size)
    os.utime(path, (1000 + age, 1000 + age))
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_longest_unused_make_room(tmp_path: Path) -> None:
    for age, name in enumerate("abcd"):
        entry(tmp_path, name, 30, age)
    note_use(tmp_path / "a")
    hold = hold_directory(tmp_path, "new", size=40, limit=100)
    assert hold.path == tmp_path / "new.40"
    assert names(tmp_path) == {"a", "d", "new.40"}, "b and c are the oldest; a was used again"


def test_a_directory_counts_for_what_it_will_hold(tmp_path: Path) -> None:
    first = hold_directory(tmp_path, "first", size=60, limit=100)
    with pytest.raises(BitwrightError, match=r"BW501.*BITWRIGHT_CACHE_LIMIT.*in use"):
        hold_directory(tmp_path, "second", size=50, limit=100)
    assert hold_directory(tmp_path, "second", size=40, limit=100).path.is_dir()
    assert first.path.is_dir()
    del first
    hold_directory(tmp_path, "third", size=50, limit=100)
    assert names(tmp_path) == {"second.40", "third.50"}


def test_the_same_name_is_found_again_and_renewed(tmp_path: Path) -> None:
    first = hold_directory(tmp_path, "key", size=10, limit=100)
    (first.path / "data").write_bytes(b"kept")
    os.utime(first.path, (1000, 1000))
    again = hold_directory(tmp_path, "key", size=10, limit=100)
    assert (again.path / "data").read_bytes() == b"kept" and again.path.stat().st_mtime > 1000


def test_what_is_larger_than_the_limit_is_refused_and_makes_nothing(tmp_path: Path) -> None:
    with pytest.raises(BitwrightError, match="BW501") as caught:
        hold_directory(tmp_path / "cache", "key", size=101, limit=100)
    assert caught.value.where and "BITWRIGHT_CACHE_LIMIT" in caught.value.suggestion
    assert not (tmp_path / "cache").exists()
    entry(tmp_path, "old", 30, 0)
    with pytest.raises(BitwrightError, match="BW501"):
        hold_directory(tmp_path, "key", size=1, limit=0)
    assert names(tmp_path) == set(), "a limit that was lowered is kept nevertheless"


def test_no_room_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(BitwrightError, match=r"BW501.*are free"):
        hold_directory(tmp_path, "key", size=1000, limit=10_000)
    assert names(tmp_path) == set()
    assert hold_directory(tmp_path, "key", size=900, limit=10_000).path.is_dir()


def test_what_another_process_uses_stays_until_it_ends(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path), "theirs", "60", "100"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "theirs.60\n"
        os.utime(tmp_path / "theirs.60", (1000, 1000))
        with pytest.raises(BitwrightError, match="in use"):
            hold_directory(tmp_path, "mine", size=60, limit=100)
        theirs = Hold(tmp_path / "theirs.60")
        theirs.discard()
        assert names(tmp_path) == {"theirs.60"}
        other.kill()
    hold_directory(tmp_path, "mine", size=60, limit=100)
    assert names(tmp_path) == {"mine.60"}


def test_processes_that_make_room_at_once_stay_within_the_limit(tmp_path: Path) -> None:
    racers = [subprocess.Popen([sys.executable, "-c", RACER, str(tmp_path), str(seed)]) for seed in (1, 2)]
    assert [racer.wait(60) for racer in racers] == [0, 0]
    assert sum(40 for path in tmp_path.iterdir()) <= 100


def test_one_who_discards_gives_the_disk_back(tmp_path: Path) -> None:
    hold = hold_directory(tmp_path, "key", size=10, limit=100)
    (hold.path / "data").write_bytes(b"some")
    hold.discard()
    hold.discard()
    assert names(tmp_path) == set()


def test_files_make_room_by_their_pattern(tmp_path: Path) -> None:
    for age, name in enumerate(("a.packed", "b.packed", "c.packed", "notes.txt")):
        (tmp_path / name).write_bytes(b"x" * 30)
        os.utime(tmp_path / name, (1000 + age, 1000 + age))
    (tmp_path / "link.packed").symlink_to(tmp_path / "notes.txt")
    assert make_room(tmp_path, "*.packed", allowed=40, keep=tmp_path / "a.packed") == 1
    assert names(tmp_path) == {"a.packed", "c.packed", "notes.txt", "link.packed"}
    assert make_room(tmp_path, "*.packed", allowed=0, keep=tmp_path / "d.packed") == 2
    assert make_room(tmp_path / "nowhere", "*", allowed=0, keep=tmp_path / "d") == 0
    assert names(tmp_path) == {"notes.txt", "link.packed"}


def test_a_disk_without_locks_is_used_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    entry(tmp_path, "old", 90, 0)
    monkeypatch.setattr(kept.fcntl, "flock", fail)
    hold_directory(tmp_path, "new", size=20, limit=100)
    assert names(tmp_path) == {"new.20"}


def test_what_cannot_be_removed_counts_and_stops_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, name in enumerate("ab"):
        entry(tmp_path, name, 40, age)
    remove = kept.remove_tree

    def stubborn(path: Path) -> None:
        if path.name == "a":
            raise BitwrightError("BW501", "no", suggestion="none")
        remove(path)

    monkeypatch.setattr(kept, "remove_tree", stubborn)
    hold_directory(tmp_path, "new", size=50, limit=100)
    assert names(tmp_path) == {"a", "new.50"}
    with pytest.raises(BitwrightError, match="in use"):
        hold_directory(tmp_path, "newer", size=70, limit=100)
