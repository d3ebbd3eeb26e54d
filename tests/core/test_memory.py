"""What is free, from the files of control groups of both versions; large pages and paused collections."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from bitwright.core import memory

MACHINE = {"/proc/meminfo": "MemTotal: 8000 kB\nMemFree: 10 kB\nMemAvailable: 7000 kB\n"}
MACHINE_TOTAL, MACHINE_FREE = 8_192_000, 7_168_000
V2, V1 = "/sys/fs/cgroup", "/sys/fs/cgroup/memory"


def pretend(monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> None:
    monkeypatch.setattr(memory, "read_system_file", lambda path: files.get(str(path), ""))


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (MACHINE_TOTAL, MACHINE_FREE)),
        ({f"{V2}/memory.max": "max\n", f"{V2}/memory.current": "5\n"}, (MACHINE_TOTAL, MACHINE_FREE)),
        ({f"{V2}/memory.max": "1000000\n", f"{V2}/memory.current": "400000\n"}, (1_000_000, 600_000)),
        (  # file cache is given back when memory is needed
            {
                f"{V2}/memory.max": "1000000\n",
                f"{V2}/memory.current": "900000\n",
                f"{V2}/memory.stat": "anon 100000\ninactive_file 300000\nactive_file 200000\n",
            },
            (1_000_000, 600_000),
        ),
        (  # used beyond what is granted
            {f"{V2}/memory.max": "1000000\n", f"{V2}/memory.current": "1400000\n"},
            (1_000_000, 0),
        ),
        (  # a limit above the group that the process is in
            {
                "/proc/self/cgroup": "0::/a/b\n",
                f"{V2}/a/memory.max": "2000000\n",
                f"{V2}/a/memory.current": "500000\n",
                f"{V2}/a/b/memory.max": "max\n",
            },
            (2_000_000, 1_500_000),
        ),
        (
            {
                "/proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/somewhere/else\n0::/\n",
                f"{V1}/memory.limit_in_bytes": "3000000\n",
                f"{V1}/memory.usage_in_bytes": "2500000\n",
                f"{V1}/memory.stat": "inactive_file 1\ntotal_inactive_file 1000000\n",
            },
            (3_000_000, 1_500_000),
        ),
        (  # how version 1 says that there is no limit
            {
                "/proc/self/cgroup": "4:memory:/\n",
                f"{V1}/memory.limit_in_bytes": "9223372036854771712\n",
                f"{V1}/memory.usage_in_bytes": "2500000\n",
            },
            (MACHINE_TOTAL, MACHINE_FREE),
        ),
    ],
)
def test_control_groups_bound_what_is_free(
    files: dict[str, str], expected: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, MACHINE | files)
    assert memory.machine_memory() == expected


def test_systems_without_these_files_still_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, {})
    total, available = memory.machine_memory()
    assert total == available == os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_file_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert memory.read_system_file(tmp_path / "nothing") == ""


@pytest.mark.parametrize("size", [0, 5, 4096, (2 << 20) - 1, 9 << 20])
def test_advice_on_pages_leaves_numbers_alone(size: int) -> None:
    tensor = torch.arange(size, dtype=torch.int32).to(torch.uint8)
    expected = tensor.clone()
    assert memory.use_huge_pages(tensor) is tensor and torch.equal(tensor, expected)
    assert memory.use_huge_pages(torch.empty(size, device="meta")).shape == (size,)


def test_trimming_is_harmless() -> None:
    kept = torch.ones(1000)
    memory.trim_memory()
    assert float(kept.sum()) == 1000


def test_collections_go_on_afterwards() -> None:
    with memory.no_collections():
        assert not gc.isenabled()
    assert gc.isenabled()
    gc.disable()
    try:
        with memory.no_collections():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()
        gc.unfreeze()


def test_files_are_read_ahead_without_a_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in (("a.safetensors", 20 << 20), ("b.safetensors", 10), ("notes.txt", 10)):
        (tmp_path / name).write_bytes(bytes(size))
    (tmp_path / "c.safetensors").mkdir()
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(memory, "machine_memory", lambda: (0, 2 * ((20 << 20) + 4)))
    monkeypatch.setattr(os, "posix_fadvise", lambda _, start, size, advice: asked.append((start, size)))
    thread = memory.read_ahead(tmp_path)
    assert thread is not None and thread.daemon
    thread.join()
    ahead = 8 << 20
    assert asked == [(0, ahead), (ahead, ahead), (2 * ahead, 4 << 20), (0, 4)]  # then there is no more room
    for nothing in (tmp_path / "missing", tmp_path / "a.safetensors", Path("demo:"), tmp_path / "c.safetensors"):
        assert memory.read_ahead(nothing) is None
