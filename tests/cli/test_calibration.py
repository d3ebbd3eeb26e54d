"""``bitwright calibrate``, and the shell blocks of LMDeploy's document."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import pytest

from bitwright.cli import main
from bitwright.models.embedded_model import embedded_directory
from bitwright.models.kv_parameters import read_ranges

FAST = ["--calib-samples", "4", "--calib-seqlen", "64", "--plain"]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded_directory(), tmp_path / "model"))


def test_the_blocks_of_the_document(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (model.parent / "text.txt").write_text((model / "calibration.txt").read_text()[:20_000])
    where = ["--calib-dataset", str(model.parent / "text.txt"), "--work-dir", str(model)]
    assert main(["lite", "calibrate", str(model), *FAST, *where]) == 0
    assert "calibrated 5 layers on 4 samples of 64 tokens" in capsys.readouterr().out
    lines = iter(["Tell me a story."])

    def read(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    command = ["chat", "turbomind", str(model), "--model-format", "hf", "--quant-policy", "4", "--max-tokens", "5"]
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "int8-static" in shown.splitlines()[0]
    assert "kB int8-static" in shown


def test_four_bit_weights_and_eight_bit_keys_together(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "w4"
    assert (
        main(["quantize", str(model), "-o", str(out), "--scheme", "w4g64-asym", "--format", "awq", "--no-check"]) == 0
    )
    assert main(["calibrate", str(out), *FAST]) == 0
    lines = iter(["Tell me a story."])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines, "/exit"))
    command = ["chat", "turbomind", str(out), "--model-format", "awq", "--quant-policy", "4", "--max-tokens", "5"]
    capsys.readouterr()
    assert main(command) == 0
    assert "kB int8-static" in capsys.readouterr().out


def test_check_and_export(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """E6."""
    export = ["--export-lmdeploy", str(tmp_path / "weights"), "--tensor-parallel", "2"]
    assert main(["calibrate", str(model), *FAST, "--check", "--json", *export]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["check"]["recommended"]
    assert len(record["check"]["layers"]) == 5
    ranges = read_ranges(model, 5)
    for rank in (0, 1):
        content = (tmp_path / "weights" / f"layers.3.past_kv_scale.{rank}.weight").read_bytes()
        key_scale, key_zero, value_scale, _ = struct.unpack("<4f", content)
        low, high = float(ranges[3]["key"].low[rank]), float(ranges[3]["key"].high[rank])
        assert key_scale == pytest.approx((high - low) / 255, rel=1e-6)
        assert key_zero == pytest.approx((high + low) / 2, rel=1e-5, abs=1e-6)
        assert value_scale > 0


def test_what_cannot_be_exported_is_refused_before_anything_runs(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """E6."""
    split = ["--tensor-parallel", "3"]
    assert main(["calibrate", str(model), *FAST, "--export-lmdeploy", str(tmp_path / "weights"), *split]) == 2
    assert "2 heads of keys and values do not divide among 3 ranks" in capsys.readouterr().err
    for lonely in (split, ["--symmetric"]):
        assert main(["calibrate", str(model), *FAST, *lonely]) == 2
        assert "--export-lmdeploy" in capsys.readouterr().err
    assert not (model / "kv_parameters.safetensors").exists()


def test_what_comes_next_works(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Calibrated scales are read beside the weights; elsewhere they are not recommended."""
    assert main(["calibrate", str(model), *FAST]) == 0
    assert f"bitwright chat {model} --kv-cache int8-static" in capsys.readouterr().out
    assert main(["calibrate", str(model), *FAST, "--work-dir", str(tmp_path / "else")]) == 0
    shown = capsys.readouterr().out
    assert f"bitwright chat {model} --kv-cache int8\n" in shown
    assert "beside the weights" in shown


@pytest.mark.parametrize(
    ("more", "status", "told"),
    [
        (["--calib-dataset", "c4"], 4, "--calib-dataset ./my.txt"),
        (["--calib-dataset", "nothing"], 4, "neither a file"),
        (["--calib-samples", "0"], 2, "samples is 0"),
        (["--calib-seqlen", "100000"], 2, "try: --calib-seqlen 512"),
    ],
)
def test_faults(more: list[str], status: int, told: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", str(model), *more]) == status
    assert told in capsys.readouterr().err


def test_the_program_itself_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["calibrate", "demo:"]) == 2
    assert "--work-dir" in capsys.readouterr().err
