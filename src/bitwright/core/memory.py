"""The memory of this machine: how much there is, what is free, and giving it back. Standard library only."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import mmap
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "machine_memory",
    "map_memory",
    "no_collections",
    "read_ahead",
    "read_system_file",
    "trim_memory",
    "use_huge_pages",
]

AHEAD = 8 << 20  # bytes asked for at a time
HUGE_PAGE = 2 << 20  # on x86-64, and on arm64 with pages of 4 KiB
CGROUPS = Path("/sys/fs/cgroup")
RECLAIMABLE = ("active_file", "inactive_file", "slab_reclaimable")  # counted as used, and given back when needed


def machine_memory() -> tuple[int, int]:
    """Total and available bytes: of the machine, or of the control groups that this process is in if they grant less.

    File cache counts as available: the system gives it up before it refuses memory.
    """
    fields = _numbers(read_system_file(Path("/proc/meminfo")))
    total, available = (fields.get(name, 0) * 1024 for name in ("MemTotal", "MemAvailable"))
    if not total:
        total = available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = total
    for limit, used in _control_groups():
        if limit < machine:
            total, available = min(total, limit), min(available, max(0, limit - used))
    return total, available


def read_system_file(path: Path) -> str:
    """The text of a file of ``/proc`` or ``/sys``; empty where there is none."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def trim_memory() -> None:
    """Return freed heap pages to the system.

    glibc keeps freed blocks below its (growing) threshold of up to 32 MiB in its heaps, where small long-lived
    allocations between them hold whole blocks of weights hostage: a stream of equal blocks then grows without a leak.
    """
    trim = _c_function("malloc_trim")
    if trim is not None:
        trim(0)


def read_ahead(directory: Path) -> threading.Thread | None:
    """Have the system read the weight files of ``directory`` into its cache, up to half of what is free.

    Nothing waits for it and nothing fails by it: it fills the seconds in which large packages are imported.
    """
    advise = getattr(os, "posix_fadvise", None)
    paths = sorted(directory.glob("*.safetensors")) if advise is not None and os.path.isdir(directory) else []
    if not paths:
        return None
    thread = threading.Thread(target=_read_files, args=(paths, machine_memory()[1] // 2), daemon=True)
    thread.start()
    return thread


def map_memory(size: int) -> mmap.mmap:
    """``size`` zeros of their own, in large pages if the system has them, that take memory where they are written to.

    Raises:
        OSError, ValueError: if there is no such memory.
    """
    piece = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError, ValueError, AttributeError):  # a system without large pages
        piece.madvise(mmap.MADV_HUGEPAGE)
    return piece


def use_huge_pages(tensor: Tensor) -> Tensor:
    """Ask for large pages where ``tensor`` (on the CPU, not written yet) lies, if the system has them; return it.

    The first write to each page of 4 KiB costs about as much as reading ten of them from the file cache.
    """
    if tensor.nbytes < 2 * HUGE_PAGE or tensor.device.type != "cpu":
        return tensor
    start, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    start, end = start // HUGE_PAGE * HUGE_PAGE, -(-end // HUGE_PAGE) * HUGE_PAGE  # its neighbours in the heap may gain
    advise, huge = _c_function("madvise"), getattr(mmap, "MADV_HUGEPAGE", None)
    if advise is not None and huge is not None:
        advise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), huge)
    return tensor


@contextlib.contextmanager
def no_collections(*, freeze: bool = True) -> Iterator[None]:
    """Collect no garbage for as long as this lasts: importing large packages makes nothing but what will stay.

    ``freeze``: nor look through anything that there is by its end at a later collection, garbage included.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            if freeze:
                gc.freeze()
            gc.enable()


def _read_files(paths: Sequence[Path], room: int) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            try:
                size = min(os.fstat(descriptor).st_size, room)
                for start in range(0, size, AHEAD):
                    os.posix_fadvise(descriptor, start, min(AHEAD, size - start), os.POSIX_FADV_WILLNEED)
                room -= size
            finally:
                os.close(descriptor)


@cache
def _c_function(name: str) -> Callable[..., int] | None:
    """A function of the C library; those of glibc and of Linux are not everywhere."""
    try:
        function: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (AttributeError, OSError, TypeError):
        return None
    return function


def _control_groups() -> Iterator[tuple[int, int]]:
    """Limit and use, in bytes, of each control group with a limit, from this process's own up to the root."""
    for line in read_system_file(Path("/proc/self/cgroup")).splitlines() or ["0::/"]:
        _, controllers, name = [*line.split(":", 2), "", ""][:3]
        if controllers == "":
            root, files = CGROUPS, ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            root, files = CGROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        own = root / name.lstrip("/")
        for group in (own, *own.parents):
            limit, used = (read_system_file(group / file).strip() for file in files)
            if limit.isdigit() and used.isdigit():
                held = _numbers(read_system_file(group / "memory.stat"))
                # Version 1 tells its own figures by these names, and those of all groups below with "total_" before.
                spare = sum(held.get(f"total_{field}", held.get(field, 0)) for field in RECLAIMABLE)
                yield int(limit), int(used) - spare
            if group == root:
                break


def _numbers(text: str) -> dict[str, int]:
    """Lines of a name and a whole number, with or without a colon and a unit."""
    fields: dict[str, int] = {}
    for line in text.splitlines():
        name, *values = line.replace(":", " ").split() or [""]
        if values and values[0].isdigit():
            fields[name] = int(values[0])
    return fields
