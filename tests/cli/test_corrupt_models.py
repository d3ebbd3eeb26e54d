"""Corrupted model directories on the command line: exit status 0 or 3, one block, no traceback, nothing touched."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from bitwright.cli import main
from tests.fuzz.corruptions import Corrupted, corruptions, snapshot
from tests.quantization.tiny import TEXT, save_model

MUST_FAIL = ("open", "load")  # whoever refuses these, every command that reads the model meets them


def _float(directory: Path) -> None:
    save_model(directory)


def _sharded(directory: Path) -> None:
    save_model(directory, "llama", shard="30KB")


def _quantized(scheme: str) -> Callable[[Path], None]:
    def make(directory: Path) -> None:
        save_model(directory.parent / "original")
        output = ("-o", str(directory), "--scheme", scheme, "--no-check")
        assert main(("quantize", str(directory.parent / "original"), *output)) == 0

    return make


MODELS: dict[str, Callable[[Path], None]] = {
    "float": _float,
    "sharded": _sharded,
    "compressed-tensors": _quantized("w4g32"),
    "native": _quantized("nf4g32-dq"),
}


@pytest.mark.parametrize("name", MODELS)
def test_some_corrupted_models(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(name, 25, tmp_path, capsys)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_hundreds_of_corrupted_models(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    check(name, 130, tmp_path, capsys)


def check(name: str, count: int, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Run the commands that read a model of this kind on ``count`` corrupted copies of it."""
    MODELS[name](workplace / "source")
    (workplace / "text.txt").write_text(TEXT)
    capsys.readouterr()
    statuses: Counter[int] = Counter()
    for corrupted in corruptions(workplace / "source", workplace, seed=len(name), count=count):
        model, output = str(corrupted.model), workplace / "out"
        commands = [("generate", model, "once", "--max-tokens", "2"), ("inspect", model)]
        if name in ("float", "sharded"):
            commands.append(("quantize", model, "-o", str(output), "--scheme", "w4g32", "--no-check"))
        else:
            commands.append(("eval", model, "--text", str(workplace / "text.txt"), "--max-tokens", "64"))
        for command in commands:
            statuses[run(command, corrupted, capsys)] += 1
            shutil.rmtree(output, ignore_errors=True)
    assert statuses[3] > count, "most of the damage should be found"
    assert statuses[0], "some of it is harmless"


def run(command: tuple[str, ...], corrupted: Corrupted, capsys: pytest.CaptureFixture[str]) -> int:
    """Run one command, and check all that a user could see of it."""
    before = snapshot(corrupted.outside), snapshot(corrupted.model)
    status = main(command)
    captured = capsys.readouterr()
    about = f"{corrupted.name}, {command[0]}: {captured.err}"
    assert "Traceback" not in captured.out + captured.err, about
    assert (snapshot(corrupted.outside), snapshot(corrupted.model)) == before, about
    # Damaged numbers may be finite in the file and infinite in a product.
    allowed = {0, 3, 6} if corrupted.stage == "maybe" else {0, 3}
    assert status in allowed, about
    if status:
        assert captured.err.startswith(f"error[BW{status}"), about
    if corrupted.stage == "open" or (corrupted.stage in MUST_FAIL and command[0] != "inspect"):
        assert status == 3, about
    if corrupted.stage == "text" and command[0] in ("generate", "eval"):
        assert status == 3, about
    return status
