"""Every program is compiled, without a GPU, for each generation: types and layouts are right, no register is spilled.

In a process of its own, since Triton does not compile what it interprets. The machine code is looked at, too: weights
come 16 bytes at a time, and the matrix units are used where Triton knows how.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.kernels.gpu.compilation_facts import GENERATIONS

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("interpreted")]
MATRIX_UNITS = {
    80: ("HMMA", "IMMA"),
    89: ("HMMA", "IMMA", "QMMA"),
    90: ("HGMMA", "IGMMA", "QGMMA", "HMMA", "IMMA", "QMMA"),
}


def apart(generation: int) -> Any:
    """Tests of one generation run in one process, so that its programs are compiled once."""
    return pytest.param(generation, marks=pytest.mark.xdist_group(f"compilation for {generation}"))


@functools.cache
def compiled(generation: int) -> list[dict[str, Any]]:
    """The facts of every launch that this generation can make."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.kernels.gpu.compilation", str(generation)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1500)
    assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("generation", [apart(each) for each in GENERATIONS])
def test_every_program_compiles_and_fits(generation: int) -> None:
    for launch in compiled(generation):
        where = f"{launch['case']}: {launch['program']}"
        assert launch["shared"] <= GENERATIONS[generation].shared_bytes, where
        assert launch["stack"] <= 16, f"{where} spills"


@pytest.mark.parametrize("generation", [apart(each) for each in MATRIX_UNITS])
def test_products_run_on_the_matrix_units(generation: int) -> None:
    products = [
        each for each in compiled(generation) if each["program"] in ("linear", "integer", "attend", "fp8_product")
    ]
    products = [each for each in products if "float32" not in each["case"]]
    assert len(products) > 10
    for launch in products:
        used = sum(count for name, count in launch["opcodes"].items() if name.startswith(MATRIX_UNITS[generation]))
        assert used > 0, f"{launch['case']}: {launch['program']} uses no matrix unit"


@pytest.mark.parametrize("generation", [apart(each) for each in MATRIX_UNITS])
def test_weights_are_read_sixteen_bytes_at_a_time(generation: int) -> None:
    for launch in compiled(generation):
        if launch["program"] == "linear" and launch["case"].startswith("w4g128"):
            loads = [name for name in launch["opcodes"] if name.startswith("LDG") and "128" in name]
            assert loads, launch["case"]


@pytest.mark.xdist_group("compilation for 90")
def test_unpacking_takes_few_instructions() -> None:
    """At 4 bits: 128 weights a thread and chunk. Whole-number instructions bind the speed at which memory can be read;
    at 64 of them a clock and processor an H200 needs at most 1.6 for each weight to keep up with its memory."""
    launch = next(each for each in compiled(90) if each["case"] == "w4g128 bf16 rows 1" and each["program"] == "linear")
    integer = sum(launch["opcodes"].get(name, 0) for name in ("LOP3.LUT", "SHF.R.U32.HI", "PRMT"))
    assert integer <= 1.8 * 128, integer
