"""The programs of csrc/ladder are built and run, and every version in them agrees with float64."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPUINFO = Path("/proc/cpuinfo")
# Small enough for seconds; what each prints that has one row a version.
PROGRAMS = {
    "attention": (["14", "2", "64", "256"], ("v1 plain", "v2 shared", "v3 library", "bfloat16", "int8", "int4")),
    "gemm_w4a8": ([], ("v1", "v6")),
    "gemv_w4a8": (["1024", "1024"], ("v1 plain", "v2 vector rows", "v3 panels of rows", "v4 library")),
    "layers": (["240", "1280"], ("norm and rounding", "silu times gate", "rotary positions", "rows of a weight")),
    "sampling": (["40000"], ("likeliest", "temperature 0.8", "top-k 50", "top-p 0.9", "min-p 0.05", "k, p and min-p")),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if shutil.which("cmake") is None or shutil.which("g++") is None:
        pytest.skip("needs cmake and g++")
    if platform.machine() != "x86_64" or "avx512_vnni" not in CPUINFO.read_text():
        pytest.skip("needs a processor with AVX-512 VNNI")
    folder = tmp_path_factory.mktemp("ladder")
    options = ["-DBITWRIGHT_PYTHON=OFF", "-DBITWRIGHT_LADDER=ON", "-DCMAKE_BUILD_TYPE=Release"]
    if shutil.which("ccache") is not None:
        options.append("-DCMAKE_CXX_COMPILER_LAUNCHER=ccache")
    installed = _installed_kernels()
    if installed is not None:
        options.append(f"-DBITWRIGHT_KERNELS={installed}")
    subprocess.run(["cmake", "-S", str(ROOT), "-B", str(folder), *options], check=True, capture_output=True)
    done = subprocess.run(["cmake", "--build", str(folder), "-j", "2"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


def _installed_kernels() -> Path | None:
    """What the package was installed with, if it is newer than its sources: to build it again takes minutes."""
    sources = [path for kind in ("*.cpp", "*.h") for path in (ROOT / "csrc").rglob(kind)]
    changed = max(path.stat().st_mtime for path in sources if path.parent.name != "ladder")
    newer = [path for path in ROOT.glob("build/*/libbitwright_kernels.a") if path.stat().st_mtime > changed]
    return max(newer, key=lambda path: path.stat().st_mtime, default=None)


def test_every_program_is_built() -> None:
    assert {path.stem for path in (ROOT / "csrc" / "ladder").glob("*.cpp")} == set(PROGRAMS)


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_version_agrees_with_float64(built: Path, program: str) -> None:
    arguments, rows = PROGRAMS[program]
    done = subprocess.run([str(built / program), *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in rows:
        assert row in done.stdout, done.stdout
