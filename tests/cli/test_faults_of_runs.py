"""What can go wrong while a command runs: disks, locks, kills, memory. Numbers are those of the catalogue of faults."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import bitwright
from bitwright.cli import main
from bitwright.formats import storage
from bitwright.formats.storage import lock_directory
from bitwright.kernels import table
from tests.cli.damaged_models import CALIBRATE, GENERATE, QUANTIZE, Folder, finish_half, tree


def test_disk_full_before_the_start(
    folder: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 4: what is needed, what is free, where."""
    usage = shutil.disk_usage(folder.path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert main(QUANTIZE) == 5
    err = capsys.readouterr().err
    assert err.startswith("error[BW501]: ")
    assert str(folder.path / "out") in err
    assert "try: free " in err


def test_disk_full_in_the_middle(
    folder: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 4: the temporary file is gone, finished blocks stay, and the same command ends well."""
    write, calls = os.write, [0]

    def full(descriptor: int, data: bytes) -> int:
        calls[0] += 1
        if calls[0] == 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(descriptor, data)

    with monkeypatch.context() as patch:
        patch.setattr(storage.os, "write", full)
        assert main(QUANTIZE) == 5
    err = capsys.readouterr().err
    assert err.startswith("error[BW501]: ")
    assert "run the same command again" in err
    assert list((folder.path / "out").glob("*.tmp")) + list((folder.path / "out").glob(".*.tmp")) == []
    assert main(QUANTIZE) == 0
    sound = {name: data for name, data in tree(folder.made).items() if name != "report.json"}
    made = {name: data for name, data in tree(folder.path / "out").items() if name != "report.json"}
    assert made == sound


def test_a_second_run_is_told_who_holds_the_output(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault 6."""
    work = folder.path / "out" / ".bitwright"
    work.mkdir(parents=True)
    with lock_directory(work):
        assert main(QUANTIZE) == 5
    err = capsys.readouterr().err
    assert err.startswith("error[BW502]: ")
    assert f"pid {os.getpid()} on host " in err
    assert main(QUANTIZE) == 0, "a lock that nobody holds does not matter"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_killed_run_resumes(
    folder: Folder, capsys: pytest.CaptureFixture[str], number: signal.Signals, status: int
) -> None:
    """Faults 1 to 3, in a process of its own that gets a real signal."""
    script = (
        "import os, sys, time\n"
        "from bitwright.quantization import job\n"
        "compute = job.Job._compute\n"
        "def compute_or_die(self, index, unit):\n"
        f"    while {int(number)} == 9 and index == 1 and not self.journal.done: time.sleep(0.01)\n"
        f"    if index == 1: os.kill(os.getpid(), {int(number)})\n"
        "    return compute(self, index, unit)\n"
        "job.Job._compute = compute_or_die\n"
        "from bitwright.cli import main\n"
        f"sys.exit(main({list(QUANTIZE)}))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(bitwright.__file__).parents[1])}
    assert subprocess.run([sys.executable, "-c", script], env=environment, timeout=120).returncode == status
    capsys.readouterr()
    assert main(("generate", "out", "once")) == 3
    assert "BW308" in capsys.readouterr().err
    assert main(QUANTIZE) == 0
    out = capsys.readouterr().out
    assert "resuming at" in out
    sound = {name: data for name, data in tree(folder.made).items() if name != "report.json"}
    assert {name: data for name, data in tree(folder.path / "out").items() if name != "report.json"} == sound


def test_other_settings_do_not_resume(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault 1: a mixture of two runs is refused, with the difference shown."""
    finish_half(folder)
    shutil.rmtree(folder.made / ".bitwright")
    shutil.rmtree(folder.made)
    script_out = ("quantize", "model", "-o", "made", "--scheme", "w4g32", "--no-check")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.os, "replace", _fail_at(3, os.replace))
        assert main(script_out) == 5
    capsys.readouterr()
    assert main(("quantize", "model", "-o", "made", "--scheme", "w8g32", "--no-check")) == 2
    err = capsys.readouterr().err
    assert err.startswith("error[BW207]: ")
    assert "--restart" in err
    assert main(("quantize", "model", "-o", "made", "--scheme", "w8g32", "--no-check", "--restart")) == 0


def _fail_at(number: int, real: Callable[..., Any]) -> Callable[..., Any]:
    calls = [0]

    def call(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(*arguments)

    return call


def test_few_samples_are_noticed_and_recorded(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault 20."""
    assert main((*CALIBRATE, "--samples", "4")) == 0
    assert "notice: only 4 calibration samples" in capsys.readouterr().out
    assert "only 4 calibration samples" in (folder.path / "out" / "README.md").read_text()


def test_out_of_memory_names_the_levers(
    folder: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 25."""

    def refuse(*arguments: object) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr("bitwright.quantization.job.quantize_block", refuse)
    assert main(CALIBRATE) == 5
    err = capsys.readouterr().err
    assert err.startswith("error[BW503]: ")
    assert "--samples" in err and "--seqlen" in err


def test_no_kernel_for_a_scheme(
    folder: Folder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault 18."""
    picky = tuple(replace(kernel, refuse=lambda spec: "not today") for kernel in table.KERNELS)
    monkeypatch.setattr(table, "KERNELS", picky)
    assert main(GENERATE) == 2
    err = capsys.readouterr().err
    assert err.startswith("error[BW206]: ")
    assert "w4g32" in err and "not today" in err


def test_a_collapse_in_eval_is_a_notice(folder: Folder, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault 27: exit 0, the worst modules named."""
    assert main(("quantize", "demo:", "-o", "out", "--scheme", "w1", "--no-check")) == 0
    capsys.readouterr()
    status = main(("eval", "out", "--reference", "demo:", "--max-tokens", "512", "--seqlen", "256", "--no-probes"))
    captured = capsys.readouterr()
    assert (status, captured.err) == (0, "")
    assert captured.out.partition("quality collapsed")[2].count("model.layers.") == 5
