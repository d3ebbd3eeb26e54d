"""The benchmark for GPUs: it keeps what it has, whatever goes wrong, and every path of it runs without a GPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed: make test-gpu")

from benchmarks import gpu
from benchmarks.gpu_runs import products
from benchmarks.gpu_runs.timing import Bench, Section
from benchmarks.gpu_runs.tuning import SECONDS, complete_rows
from bitwright.kernels.gpu import launch, library
from tests.kernels.gpu.compilation_facts import HOPPER


def test_rows_that_there_is_no_time_for_are_named() -> None:
    bench = Bench(is_dry=True, deadline=float("inf"))
    section = bench.begin("a", ("number",))
    for number in bench.within(section, range(4)):
        section.add(number)
        if number == 1:
            bench.section_deadline = time.monotonic() - 1
    assert section.rows == [(0,), (1,)] and section.notes == ["out of time, so left out: 2; 3"]


def test_a_failing_row_is_a_note_and_the_rows_after_it_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def row(bench: Bench, section: Section, model: str, product: str, shape: Any, scheme: str, rows: int) -> None:
        if scheme == "w8a8":
            raise RuntimeError("no such\n  layout")
        section.add(model, product, scheme, rows, *[""] * 6)

    monkeypatch.setattr(products, "_row", row)
    section = products.measure_many_rows(Bench(is_dry=False, deadline=float("inf")))
    assert len(section.rows) == 40 and {row[2] for row in section.rows} == {"w4g128", "w4g128-a8", "fp8-afp8"}
    failed = [note for note in section.notes if "failed" in note]
    assert len(failed) == 16 and failed[0].endswith("failed: RuntimeError: no such layout")
    with pytest.raises(RuntimeError, match="no such"):  # a dry run is a test
        products.measure_many_rows(Bench(is_dry=True, deadline=float("inf")))


def test_a_failing_section_and_one_without_an_end_keep_their_rows_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(bench: Bench) -> Section:
        bench.begin("fails", ("x",)).add(1)
        raise RuntimeError("no such instruction")

    def hangs(bench: Bench) -> Section:
        bench.begin("hangs", ("x",)).add(2)
        try:
            time.sleep(60)
        except Exception:  # as a search for launches takes failures
            time.sleep(60)
        raise AssertionError

    def works(bench: Bench) -> Section:
        return bench.begin("works", ("x",))

    kept: list[int] = []
    table = {"fails": (fails, 9), "hangs": (hangs, 1), "works": (works, 9)}
    monkeypatch.setattr(gpu, "SECTIONS", table)
    monkeypatch.setattr(gpu, "GRACE", 0)
    monkeypatch.setattr(gpu, "give_back", lambda: True)
    before = signal.signal(signal.SIGALRM, gpu._end)
    try:
        bench = Bench(is_dry=False, deadline=time.monotonic() + 60)
        gpu.run_sections(bench, list(table), lambda: kept.append(len(bench.sections)))
        bench.deadline = 0.0
        gpu.run_sections(bench, ["works"], lambda: kept.append(len(bench.sections)))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert [section.rows for section in bench.sections] == [[(1,)], [(2,)], [], []]
    assert "no such instruction" in bench.sections[0].notes[0] and bench.sections[1].notes[0] == "broken off"
    assert bench.sections[3].notes == ["out of time"] and kept == [1, 2, 3]


def test_a_search_that_time_ends_leaves_a_table_that_is_whole() -> None:
    for kernel in SECONDS:
        before = launch.rows_of(kernel, HOPPER)
        assert complete_rows(kernel, [], HOPPER) == before
        own = [{"rows": 16, "warps": 1}, {"rows": 1, "warps": 2}]
        found = complete_rows(kernel, own, HOPPER)
        assert found == [own[1], own[0], *(row for row in before if row["rows"] > 16)]


def test_sections_after_a_fault_of_the_gpu_run_in_a_new_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def faults(bench: Bench) -> Section:
        bench.begin("faults", ("x", "y")).add(1, "2")
        raise RuntimeError("an illegal memory access was encountered")

    def lost() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    table = dict.fromkeys(("first", "second", "third"), (faults, 9))
    monkeypatch.setattr(gpu, "SECTIONS", table)
    monkeypatch.setattr(gpu.torch.cuda, "synchronize", lost)
    bench = Bench(is_dry=False, deadline=time.monotonic() + 60)
    bench.ceilings["copy"] = 4e12
    before = signal.signal(signal.SIGALRM, gpu._end)
    try:
        rest = gpu.run_sections(bench, list(table), lambda: None)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert rest == ["second", "third"] and len(bench.sections) == 1

    commands: list[list[str]] = []
    monkeypatch.setattr(gpu.os, "execv", lambda _path, command: commands.append(command))
    bench.is_dry, rows = True, [{"rows": 1 << 30, "warps": 7}]
    gpu.go_on(bench, {"some GPU": {"linear": rows}}, rest, tmp_path / "gpu.json")
    monkeypatch.setattr(sys, "argv", [*commands[0][2:], "--dry-run"])
    arguments = gpu.parse_arguments()
    assert arguments.sections == rest and 50 <= arguments.seconds <= 60 and not arguments.tune
    assert arguments.json == arguments.after == tmp_path / "gpu.json"
    again = Bench(is_dry=True, deadline=0.0)
    monkeypatch.setitem(launch.tuned()["gpus"], "some GPU", {})
    assert gpu.take_up(again, arguments.after) == {"some GPU": {"linear": rows}}
    assert again.ceilings == bench.ceilings and again.sections == bench.sections
    assert launch.tuned()["gpus"]["some GPU"]["linear"] == rows


def test_a_search_that_fails_loses_neither_the_others_nor_the_sections(monkeypatch: pytest.MonkeyPatch) -> None:
    def some(bench: Bench, kernel: str = "attention") -> tuple[Section, list[dict[str, int]]]:
        section = bench.begin(kernel, ("x",))
        if kernel == "linear":
            raise RuntimeError("no such layout")
        return section, [{"rows": 1 << 30}]

    monkeypatch.setattr(gpu, "tune_products", some)
    monkeypatch.setattr(gpu, "tune_attention", some)
    monkeypatch.setattr(gpu, "give_back", lambda: True)
    monkeypatch.setattr(library, "describe", lambda _device: HOPPER)
    monkeypatch.setitem(launch.tuned()["gpus"], HOPPER.name, {})
    tuned: dict[str, Any] = {}
    bench = Bench(is_dry=False, deadline=time.monotonic() + 60)
    assert gpu.tune(bench, tuned.update)
    assert set(tuned[HOPPER.name]) == set(SECONDS) - {"linear"} == set(launch.tuned()["gpus"][HOPPER.name])
    assert [section.title for section in bench.sections] == list(SECONDS)
    assert "no such layout" in bench.sections[0].notes[0]
    monkeypatch.setattr(gpu, "give_back", lambda: False)
    assert not gpu.tune(bench, tuned.update) and len(bench.sections) == len(SECONDS) + 1


@pytest.mark.slow
def test_every_path_runs_without_a_gpu(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--tune", "--json", str(tmp_path / "gpu.json")]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert result.returncode == 0, result.stderr[-3000:]
    sections = json.loads((tmp_path / "gpu.json").read_text())["sections"]
    assert len(sections) == len(gpu.SECTIONS) + len(SECONDS) and all(section["rows"] for section in sections)
    assert all(section["title"] in result.stdout for section in sections)
