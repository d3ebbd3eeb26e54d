"""Memory holds one block at a time, however many there are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import checkpoints

ROOT = Path(__file__).resolve().parents[2]
MEASURE = """
import sys
from bitwright.quantization.api import quantize
from bitwright.quantization.report import peak_resident_bytes
model, output, *calibration = sys.argv[1:]
options = {"calibration": calibration[0], "samples": 4, "seqlen": 64} if calibration else {}
before = peak_resident_bytes()
report = quantize(model, output, scheme="w4g128", threads=1, **options)
print(before, report.run["peak_resident_bytes"])
"""


def peak(model: Path, output: Path) -> tuple[int, int]:
    """Peak resident bytes before the run (the libraries alone) and after it, in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, "-c", MEASURE, str(model), str(output)]
    printed = subprocess.run(command, check=True, env=environment, capture_output=True, text=True).stdout
    before, after = map(int, printed.split())
    return before, after


@pytest.mark.slow
def test_resident_memory_does_not_grow_with_the_number_of_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, wide, heads, vocabulary = 1024, 2816, 16, 4096
    monkeypatch.setitem(checkpoints.SHAPES, "medium", (hidden, wide, 8, heads, heads, vocabulary))
    block = 2 * (4 * hidden * hidden + 3 * hidden * wide)  # bytes, bf16
    peaks = {}
    for blocks in (8, 16):
        checkpoints.make_checkpoint(tmp_path / f"model{blocks}", "medium", blocks=blocks)
        before, peaks[blocks] = peak(tmp_path / f"model{blocks}", tmp_path / f"out{blocks}")
        total = sum(path.stat().st_size for path in (tmp_path / f"model{blocks}").glob("*.safetensors"))
        print(
            f"{blocks} blocks: {total >> 20} MiB of weights, {before >> 20} MiB before, {peaks[blocks] >> 20} at peak"
        )
        assert peaks[blocks] - before < 5 * block < total
    assert peaks[16] - peaks[8] < block / 2
