"""The kernels for ARM, compiled for it and run in an emulator, against float64."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 60
NEEDED = ("cmake", "aarch64-linux-gnu-g++", "qemu-aarch64")
MISSING = [tool for tool in NEEDED if shutil.which(tool) is None]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"needs {' and '.join(MISSING)} (Debian: g++-aarch64-linux-gnu, qemu-user)")
def test_neon_and_dot_products_equal_float64(tmp_path: Path) -> None:
    options = [
        "-DBITWRIGHT_PYTHON=OFF",
        "-DBITWRIGHT_TESTS=ON",
        "-DCMAKE_SYSTEM_NAME=Linux",
        "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        "-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++",
        "-DCMAKE_EXE_LINKER_FLAGS=-static",
        "-DCMAKE_BUILD_TYPE=None",  # without optimization: it takes minutes, and the emulator would gain little
        "-DCMAKE_CXX_FLAGS=-DBW_PLAIN",
    ]
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(tmp_path), *options], check=True, capture_output=True)
    build = ["cmake", "--build", str(tmp_path), "-j", "2", "--target", "float64_checks"]
    built = subprocess.run(build, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    seed = random.randrange(1 << 32)
    command = ["qemu-aarch64", "-cpu", "max", str(tmp_path / "float64_checks"), str(ROUNDS), str(seed)]
    done = subprocess.run([*command, "scalar", "neon", "neon_dotprod"], capture_output=True, text=True)
    assert done.returncode == 0, f"seed {seed}\n{done.stderr[-3000:]}"
    assert done.stdout.count(f"{ROUNDS} rounds") == 3
