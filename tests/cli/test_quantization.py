"""``bitwright quantize``: what it prints, and how it stops and resumes."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bitwright.cli import main, signals
from bitwright.cli.quantization import render_plan, resume_command
from bitwright.formats.storage import file_sha256
from bitwright.kernels.gpu import library
from bitwright.quantization import job
from bitwright.quantization.events import Event
from bitwright.quantization.units import Unit
from tests.evaluation.conftest import save_model

FINISHED = "model.safetensors.index.json"


def quantize(output: Path, *more: str) -> int:
    return main(["quantize", "demo:", "-o", str(output), "--scheme", "w4g128", "--no-check", *more])


def hashes(directory: Path) -> dict[str, str]:
    """Of everything but the report, which holds times."""
    return {path.name: file_sha256(path) for path in directory.iterdir() if path.name != "report.json"}


@pytest.fixture
def at_shard(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """``at_shard(k, act)``: call ``act``, once, while the run is at work on its shard ``k`` (from 1)."""

    def install(number: int, act: Callable[[], None]) -> None:
        compute, acted = job.Job._compute, []

        def act_and_compute(self: job.Job, index: int, unit: Unit) -> object:
            if index + 1 == number and not acted:
                acted.append(number)
                act()
            return compute(self, index, unit)

        monkeypatch.setattr(job.Job, "_compute", act_and_compute)

    return install


def kill_self(number: int) -> None:
    os.kill(os.getpid(), number)


def resume(err: str) -> list[str]:
    """The arguments of the command that an interrupted run prints."""
    match = re.search(r"to resume: (bitwright .*)", err)
    assert match is not None, err
    return shlex.split(match[1])[1:]


def test_plan_progress_result_and_next_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "a b"
    assert quantize(output) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    labels = [line.split("  ")[0] for line in lines if re.match(r"[a-z/ ]+?  ", line)]
    plan, result = (
        ["plan", "layers", "calibration", "size"],
        ["size", "bits/weight", "perplexity", "speed", "worst layer"],
    )
    assert labels[:4] == plan
    assert labels[-5:] == result
    report = json.loads((output / "report.json").read_text())
    units = [line for line in lines if re.match(r"\[\d/\d\] ", line)]
    weight_map = json.loads((output / FINISHED).read_text())["weight_map"]
    assert len(units) == len(set(weight_map.values()))
    assert f"-> {report['bits_per_weight']:.3f} (scales included)" in captured.out
    assert f"  bitwright eval '{output}' --reference demo:" in lines


def test_the_check_measures_before_and_after(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "demo:", "-o", str(tmp_path / "w8"), "--scheme", "w8", "--check"]) == 0
    match = re.search(r"perplexity +([\d.]+) -> ([\d.]+) \(x([\d.]+)\)", capsys.readouterr().out)
    assert match is not None
    before, after, ratio = map(float, match.groups())
    assert 1 < before < 100
    assert abs(after / before - ratio) < 0.01
    assert abs(ratio - 1) < 0.05


def test_a_model_of_short_context_is_checked_in_shorter_windows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "model")  # whose context is 64 tokens
    command = ["quantize", str(tmp_path / "model"), "-o", str(tmp_path / "out"), "--scheme", "w8g32", "--check"]
    assert main(command) == 0
    assert re.search(r"perplexity +\S+ -> \S+ \(x1\.\d+\) on a short text", capsys.readouterr().out)


def test_a_collapse_is_said_with_the_worst_layers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "demo:", "-o", str(tmp_path / "w1"), "--scheme", "w1", "--check"]) == 0
    out = capsys.readouterr().out
    report = json.loads((tmp_path / "w1" / "report.json").read_text())
    worst = sorted(report["layers"], key=lambda name: -report["layers"][name]["relative_error"])[:5]
    assert "notice: BW603 quality collapsed" in out
    assert all(name in out for name in worst)
    assert "bitwright explain BW603" in out


def test_json_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantize(tmp_path / "o", "--json") == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = [record["event"] for record in records]
    assert (kinds[0], kinds[-1]) == ("plan", "result")
    units = [record for record in records if record["event"] == "unit"]
    assert [record["done"] for record in units] == list(range(1, units[0]["total"] + 1))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_one_signal_stops_after_the_block_and_the_printed_command_resumes(
    tmp_path: Path,
    quantized: Path,
    capsys: pytest.CaptureFixture[str],
    at_shard: Callable[[int, Callable[[], None]], None],
    number: int,
    status: int,
) -> None:
    output = tmp_path / "out put"
    at_shard(3, lambda: kill_self(number))
    assert quantize(output) == status
    captured = capsys.readouterr()
    assert "stopping after block 3" in captured.out
    assert "stopped after block 3 of 6; to resume: " in captured.err
    assert "Traceback" not in captured.err
    assert not (output / FINISHED).exists()
    assert main(resume(captured.err)) == 0
    assert "found 3/6 " in capsys.readouterr().out
    assert hashes(output) == hashes(quantized)


def test_two_signals_stop_at_once(
    tmp_path: Path,
    quantized: Path,
    capsys: pytest.CaptureFixture[str],
    at_shard: Callable[[int, Callable[[], None]], None],
) -> None:
    at_shard(3, lambda: (kill_self(signal.SIGINT), kill_self(signal.SIGINT), pytest.fail("went on"))[0])
    assert quantize(tmp_path / "o") == 130
    captured = capsys.readouterr()
    assert "press again to stop now" in captured.out
    assert "stopped during block 3" in captured.err
    assert main(resume(captured.err)) == 0
    assert "found 2/6 " in capsys.readouterr().out
    assert hashes(tmp_path / "o") == hashes(quantized)


def test_sigterm_waits_no_longer_than_its_limit(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    at_shard: Callable[[int, Callable[[], None]], None],
) -> None:
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.2)
    at_shard(2, lambda: (kill_self(signal.SIGTERM), time.sleep(20))[0])
    started = time.monotonic()
    assert quantize(tmp_path / "o") == 143
    assert time.monotonic() - started < 10
    assert "stopped during block 2" in capsys.readouterr().err


def test_signals_act_as_before_afterwards(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)]
    assert quantize(tmp_path / "o") == 0
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)] == before


def test_the_resume_command_never_restarts() -> None:
    arguments = ["quantize", "a b", "-o", "c", "--restart", "--scheme", "w4"]
    assert resume_command(arguments) == "bitwright quantize 'a b' -o c --scheme w4"


def test_a_gpu_that_is_not_there_is_refused_and_one_that_is_has_its_memory_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if library.missing() is None:
        pytest.skip("there is a GPU here")
    assert quantize(tmp_path / "out", "--device", "cuda") == 2
    told = capsys.readouterr().err
    assert "BW201" in told and "no usable GPU is present" in told and not (tmp_path / "out").exists()
    facts = {"model": "m", "scheme": "w4", "algorithm": "gptq", "format": "native", "layers": 1, "blocks": 1}
    facts |= {
        "left_float": 0,
        "overrides": {"w8 by rtn": list("abcd")},
        "source_bytes": 1,
        "output_bytes": 1,
        "device": "cuda:0",
        "device_bytes": 3 << 30,
    }
    shown = render_plan(Event("plan", "", facts), tmp_path)
    assert re.search(r"device +cuda:0, about 3\.\d* GB at most", shown), shown
    assert "overrides    w8 by rtn: a and 3 more\n" in shown


def test_every_option_reaches_the_run(tmp_path: Path) -> None:
    options = ["--format", "native", "--calibration", "calibration", "--samples", "3", "--seqlen", "64", "--seed", "7"]
    options += [
        "--threads",
        "1",
        "--override",
        "lm_head=float",
        "--override",
        ".*down_proj=w8",
        "--group-fallback",
        "skip",
    ]
    assert quantize(tmp_path / "o", *options) == 0
    report = json.loads((tmp_path / "o" / "report.json").read_text())
    assert (report["format"], report["recipe"]["seed"], report["run"]["threads"]) == ("native", 7, 1)
    assert (report["calibration"]["samples"], report["calibration"]["seqlen"]) == (3, 64)
    assert report["layers"]["model.layers.0.mlp.down_proj"]["scheme"] == "w8"
