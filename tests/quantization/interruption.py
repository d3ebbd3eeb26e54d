"""Every system call that changes files, watched: what a kill or a power cut before it would leave, or made to fail."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

__all__ = ["Failing", "States", "restore", "watch_calls"]

CHANGING = ("write", "fsync", "replace", "rename", "unlink", "remove", "mkdir", "rmdir", "ftruncate", "open")
Tree = dict[str, bytes | None]  # contents by relative path; None is a directory
Watcher = Callable[[str, tuple[Any, ...]], None]


def _changes(name: str, arguments: tuple[Any, ...]) -> bool:
    """Opening counts if it is for writing, or of a directory (to synchronize it)."""
    wanted = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_DIRECTORY
    return name != "open" or bool(len(arguments) > 1 and arguments[1] & wanted)


@contextmanager
def watch_calls(before: Watcher, *, after: Watcher | None = None, tear: bool = False) -> Iterator[None]:
    """Call ``before`` ahead of each changing call of the ``os`` module, and ``after`` behind it.

    ``before`` may raise what the call then raises. With ``tear`` a write happens in two halves, with ``before`` between
    them too. Nothing is really synchronized: no machine goes down here, and it is slow.
    """

    def replaced(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            if not _changes(name, arguments):
                return real(*arguments, **keywords)
            before(name, arguments)
            if name == "write" and tear and len(arguments[1]) > 1:
                half = real(arguments[0], arguments[1][: len(arguments[1]) // 2])
                before(name, arguments)
                result = half + real(arguments[0], arguments[1][half:])
            else:
                result = None if name == "fsync" else real(*arguments, **keywords)
            if after is not None:
                after(name, arguments)
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGING:
            patch.setattr(os, name, replaced(name, getattr(os, name)))
        yield


def read_tree(root: Path) -> Tree:
    """All that lies below ``root``, without the lock: the kernel drops it with the process."""
    if not root.exists():
        return {}
    tree: Tree = {".": None}
    for path in sorted(root.rglob("*")):
        if path.name != "lock":
            tree[path.relative_to(root).as_posix()] = path.read_bytes() if path.is_file() else None
    return tree


def restore(root: Path, tree: Tree) -> None:
    """Make ``root`` what ``tree`` says."""
    shutil.rmtree(root, ignore_errors=True)
    for name, data in tree.items():
        path = root / name
        if data is None:
            path.mkdir(parents=True, exist_ok=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


@dataclass
class States:
    """Collects, during one run, every distinct state of ``root`` that a kill or a power cut could leave.

    A kill leaves what was written. A power cut leaves, of each file, what was synchronized, under the names that its
    directory had when that was synchronized.
    """

    root: Path
    killed: dict[str, Tree] = field(default_factory=dict)
    cut: dict[str, Tree] = field(default_factory=dict)
    calls: int = 0
    _contents: dict[int, bytes] = field(default_factory=dict)  # synchronized, by inode
    _names: dict[Path, dict[str, int | None]] = field(default_factory=dict)  # synchronized; None: a directory
    _lost: dict[tuple[Path, str], bytes] = field(default_factory=dict)

    @contextmanager
    def collect(self) -> Iterator[None]:
        with watch_calls(self._before, after=self._after, tear=True):
            yield

    def _before(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.calls += 1
        tree = read_tree(self.root)
        self.killed.setdefault(_key(tree), tree)
        if name in ("unlink", "remove", "replace"):
            self._forget(arguments)
        durable = self._durable(self.root, "") if self._is_durable() else {}
        self.cut.setdefault(_key(durable), durable)

    def _after(self, name: str, arguments: tuple[Any, ...]) -> None:
        if name == "open" and arguments[1] & os.O_CREAT:
            self._contents.pop(os.stat(arguments[0]).st_ino, None) if arguments[1] & os.O_EXCL else None
        if name != "fsync":
            return
        path = Path(os.readlink(f"/proc/self/fd/{arguments[0]}"))
        if path.is_dir():
            entries = {entry: path / entry for entry in os.listdir(path)}
            self._names[path] = {
                entry: None if target.is_dir() else target.stat().st_ino for entry, target in entries.items()
            }
            self._lost = {key: data for key, data in self._lost.items() if key[0] != path}
        else:
            self._contents[path.stat().st_ino] = path.read_bytes()

    def _forget(self, arguments: tuple[Any, ...]) -> None:
        """The last argument's file is about to lose its name, which a power cut may give back."""
        if len(arguments) > 0 and Path(arguments[-1]).is_absolute():
            path = Path(arguments[-1])
            inode = self._names.get(path.parent, {}).get(path.name)
            if inode is not None:
                self._lost[path.parent, path.name] = self._contents.get(inode, b"")

    def _is_durable(self) -> bool:
        return self._names.get(self.root.parent, {}).get(self.root.name, 0) is None

    def _durable(self, directory: Path, prefix: str) -> Tree:
        tree: Tree = {} if prefix else {".": None}
        for name, inode in self._names.get(directory, {}).items():
            if name == "lock":
                continue
            if inode is None:
                tree[prefix + name] = None
                tree |= self._durable(directory / name, f"{prefix}{name}/")
            else:
                tree[prefix + name] = self._lost.get((directory, name), self._contents.get(inode, b""))
        return tree


def _key(tree: Tree) -> str:
    digest = hashlib.sha256()
    for name, data in sorted(tree.items()):
        digest.update(f"{name}\0{'dir' if data is None else len(data)}\0".encode() + (data or b""))
    return digest.hexdigest()


@dataclass
class Failing:
    """Makes changing call ``number`` fail with ``code``; with ``lasting``, every later one that needs room too."""

    number: int
    code: int = errno.EIO
    lasting: bool = False
    calls: int = 0
    failed: str = ""

    @contextmanager
    def inject(self) -> Iterator[None]:
        with watch_calls(self._before):
            yield

    def _before(self, name: str, arguments: tuple[Any, ...]) -> None:
        self.calls += 1
        takes_room = name in ("write", "fsync", "mkdir", "open")
        if self.calls == self.number or (self.lasting and self.calls > self.number and takes_room):
            self.failed = self.failed or name
            raise OSError(self.code, os.strerror(self.code), str(arguments[0]))
