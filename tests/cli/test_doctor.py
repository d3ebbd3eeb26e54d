"""The machine report: plausible facts, every scheme with a kernel, what is missing."""

from __future__ import annotations

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import bitwright
from bitwright.cli import doctor as module
from bitwright.cli import main
from bitwright.core import memory
from bitwright.kernels import table


def test_facts_are_those_of_this_machine() -> None:
    machine = bitwright.doctor()
    assert machine.versions["torch"] == torch.__version__
    assert machine.versions["bitwright"] == bitwright.__version__
    assert 1 <= machine.usable_cores <= machine.cores == os.cpu_count()
    assert 0 < machine.available_memory_bytes <= machine.memory_bytes
    assert machine.disk_free_bytes["here"] > 0
    assert bool(machine.gpus) == torch.cuda.is_available()
    assert bool(machine.gpus) != bool(machine.gpu_note)


def test_every_scheme_has_a_kernel_and_refusals_have_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    picky = replace(table.KERNELS[-1], name="picky", refuse=lambda spec: "only on Tuesdays")
    monkeypatch.setattr(table, "KERNELS", (picky, *table.KERNELS))
    machine = bitwright.doctor()
    assert {choice.scheme for choice in machine.kernels} == set(module.SCHEMES)
    assert {choice.kernel for choice in machine.kernels} <= {kernel.name for kernel in table.KERNELS[1:]}
    assert all(choice.refused["picky"] == "only on Tuesdays" for choice in machine.kernels)
    assert "picky: only on Tuesdays" in module.render_machine(machine)


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    text = module.render_machine(bitwright.doctor())
    assert "pip install 'bitwright[plot]'" in text
    assert "nothing is missing" not in text


def test_the_control_group_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        "/sys/fs/cgroup/cpu.max": "100000 100000\n",
        "/sys/fs/cgroup/memory.max": "1000000\n",
        "/sys/fs/cgroup/memory.current": "400000\n",
        "/proc/meminfo": "MemTotal: 8000 kB\nMemAvailable: 7000 kB\n",
        "/proc/self/cgroup": "0::/\n",
        "/proc/cpuinfo": "model name : Test CPU\nflags : fpu avx2 amx_int8\n",
    }
    for where in (module, memory):
        monkeypatch.setattr(where, "read_system_file", lambda path: files.get(str(path), ""))
    machine = bitwright.doctor()
    assert machine.usable_cores == 1
    assert (machine.memory_bytes, machine.available_memory_bytes) == (1_000_000, 600_000)
    assert (machine.processor, machine.instruction_sets) == ("Test CPU", ("avx2", "amx_int8"))


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["doctor"]) == 0
    assert "cores usable" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["cores"] == os.cpu_count()
