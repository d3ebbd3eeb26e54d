"""The address and undefined behaviour sanitizers find nothing in any entry point, whatever it is given.

Built are the plain kernels and those with all of AVX-512.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 10_000


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None or shutil.which("g++") is None, reason="needs cmake and g++")
def test_entry_points(tmp_path: Path) -> None:
    options = [
        "-DBITWRIGHT_PYTHON=OFF",
        "-DBITWRIGHT_SANITIZE=ON",
        "-DBITWRIGHT_TESTS=ON",
        "-DCMAKE_BUILD_TYPE=Debug",
        "-DCMAKE_CXX_FLAGS=-O1",
    ]
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(tmp_path), *options], check=True, capture_output=True)
    built = subprocess.run(
        ["cmake", "--build", str(tmp_path), "-j", "2", "--target", "entry_points"], capture_output=True, text=True
    )
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    seed = random.randrange(1 << 32)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [str(tmp_path / "entry_points"), str(ROUNDS), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"seed {seed}\n{done.stderr[-5000:]}"
    assert f"{ROUNDS} rounds" in done.stdout and f"{4 * ROUNDS} mutated" in done.stdout
