"""What the compiled files show to the linker: one table each, and nothing that another file's code could replace.

A weak function, compiled for AVX-512 in one file and for plain processors in another, is one function after linking:
the program would then crash on the plain processor.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"]
FLAGS = {
    "scalar": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": AVX512,
    "avx512_vnni": [*AVX512, "-mavx512vnni"],
    "avx512_bf16": [*AVX512, "-mavx512vnni", "-mavx512bf16"],
}
TOOLS_ARE_MISSING = shutil.which("g++") is None or shutil.which("nm") is None


def test_every_file_is_known() -> None:
    assert {path.stem for path in (CSRC / "isa").glob("*.cpp")} - {"neon", "neon_dotprod"} == set(FLAGS)


@pytest.mark.slow
@pytest.mark.skipif(TOOLS_ARE_MISSING, reason="needs g++ and nm")
@pytest.mark.parametrize("isa", FLAGS)
def test_an_instruction_set_exports_its_table_alone(tmp_path: Path, isa: str) -> None:
    """Without optimization and inlining, so that nothing disappears."""
    target = tmp_path / "isa.o"
    command = [
        "g++",
        "-std=c++20",
        "-O0",
        "-DBW_PLAIN",
        "-fPIC",
        "-fno-exceptions",
        "-w",
        *FLAGS[isa],
        "-c",
        f"{CSRC}/isa/{isa}.cpp",
        "-o",
        str(target),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if "unrecognized command-line option" in done.stderr:
        pytest.skip("this compiler builds for another kind of processor")
    assert done.returncode == 0, done.stderr
    listing = subprocess.run(["nm", "--defined-only", str(target)], capture_output=True, text=True, check=True).stdout
    symbols = [line.split(maxsplit=2)[1:] for line in listing.splitlines()]
    assert len(symbols) > 50
    shown = [name for kind, name in symbols if kind not in "trdbn"]
    assert shown == [f"bw_{isa}_table"]
