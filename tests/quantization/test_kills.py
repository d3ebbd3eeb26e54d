"""Real processes, killed at random moments or started at once on one output."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from bitwright.core.errors import BitwrightError
from bitwright.quantization.api import quantize
from tests.quantization.tiny import TEXT, digests, save_model

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"}
HOLDER = """
import sys, time
from pathlib import Path
from bitwright.quantization.api import quantize
model, output, reached, go_on = map(Path, sys.argv[1:])
def wait(event):
    if event.kind == "unit" and not reached.exists():
        reached.touch()
        while not go_on.exists():
            time.sleep(0.01)
quantize(model, output, scheme="w4g32", on_event=wait)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kills")
    save_model(folder / "model", "llama", num_hidden_layers=5, shard="60KB")
    (folder / "text.txt").write_text(TEXT)
    return folder


def python(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def killed_runs(arguments: dict[str, Any], count: int) -> dict[str, Any]:
    seed = random.randrange(1 << 30)
    process = python(
        "-m", "tests.quantization.killed_runs", json.dumps(arguments), f"--count={count}", f"--seed={seed}"
    )
    printed, complaints = process.communicate(timeout=900)
    assert process.returncode == 0, complaints
    record: dict[str, Any] = json.loads(printed)
    print(record)
    return record


@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
def test_twenty_random_kills_are_resumed_to_the_same_bytes(place: Path, calibrated: bool) -> None:
    arguments: dict[str, Any] = {
        "model": str(place / "model"),
        "output": str(place / f"random-{calibrated}"),
        "scheme": "w4g32",
    }
    if calibrated:
        arguments |= {"calibration": str(place / "text.txt"), "samples": 3, "seqlen": 16}
    record = killed_runs(arguments, count=20)
    assert len(record["random"]["points"]) == 20 and not record["random"]["different"], record
    assert record["random"]["in_work"] >= 15, record  # else the moments were not inside the work
    assert record["again"]["equal"] and record["again"]["status"] in (0, 2), record
    # Of two runs at once one is told so (5), or finds the other's finished output (2); one of them ends well.
    assert all(status[0] == 0 and status[1] in (2, 5) for status in record["race"]["statuses"]), record
    assert record["race"]["wrong"] == 0, record


ALGORITHMS_KILLED: dict[str, dict[str, Any]] = {
    "gptq": {"algorithm": "gptq", "options": {"act_order": True}},
    "awq": {"algorithm": "awq"},
    "autoround": {"algorithm": "autoround", "options": {"iters": 4, "batch_size": 2}},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ALGORITHMS_KILLED)
def test_ten_random_kills_of_an_algorithm_are_resumed_to_the_same_bytes(place: Path, name: str) -> None:
    arguments: dict[str, Any] = {
        "model": str(place / "model"),
        "output": str(place / f"killed-{name}"),
        "scheme": "w3g32-asym",
        "calibration": str(place / "text.txt"),
        "samples": 4,
        "seqlen": 16,
        **ALGORITHMS_KILLED[name],
    }
    record = killed_runs(arguments, count=10)
    assert len(record["random"]["points"]) == 10 and not record["random"]["different"], record
    assert record["random"]["in_work"] >= 8, record
    assert record["again"]["equal"], record


def test_the_second_of_two_runs_is_told_who_holds_the_output(place: Path) -> None:
    output, reached, go_on = place / "locked", place / "reached", place / "go-on"
    holder = python("-c", HOLDER, *map(str, (place / "model", output, reached, go_on)))
    try:
        deadline = time.monotonic() + 120
        while not reached.exists() and holder.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        before = digests(output)
        for change in ({}, {"restart": True}, {"overwrite": True}, {"scheme": "w8"}):
            with pytest.raises(BitwrightError) as caught:
                quantize(place / "model", output, **({"scheme": "w4g32"} | change))  # type: ignore[arg-type]
            assert caught.value.code == "BW502"
            assert f"pid {holder.pid} " in caught.value.what and socket.gethostname() in caught.value.what
            assert "since 20" in caught.value.what and caught.value.exit_status == 5
        assert {name: found for name, found in digests(output).items() if name in before} == before
        go_on.touch()
        _, complaints = holder.communicate(timeout=120)
        assert holder.returncode == 0, complaints
    finally:
        holder.kill()
        holder.wait()
    quantize(place / "model", place / "alone", scheme="w4g32")
    assert digests(output) == digests(place / "alone")


@pytest.mark.slow
def test_the_command_itself_is_killed_and_run_again(tmp_path: Path) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    generator = random.Random(seed)

    def command(output: Path) -> list[str]:
        return ["-m", "bitwright", "quantize", "demo:", "-o", str(output), "--scheme", "w4g128", "--no-check"]

    began = time.perf_counter()
    whole = python(*command(tmp_path / "whole"))
    _, complaints = whole.communicate(timeout=600)
    assert whole.returncode == 0, complaints
    duration = time.perf_counter() - began
    expected = digests(tmp_path / "whole")
    output = tmp_path / "killed"
    for _ in range(6):
        process = python(*command(output))
        time.sleep(generator.uniform(0.5, 1.1) * duration)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode == 0:
            break
    if not (output / "report.json").exists():
        last = python(*command(output))
        _, complaints = last.communicate(timeout=600)
        assert last.returncode == 0, complaints
    found = digests(output)
    assert {name for name in expected if found.get(name) != expected[name]} <= set()
