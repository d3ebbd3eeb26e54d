"""Programs keep to what the oldest Triton that is accepted (3.2, of torch 2.6) can compile.

Found by compiling every launch with that version; the interpreter, and newer versions, take all of it.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import bitwright.kernels.gpu as gpu

PROGRAMS = sorted((Path(gpu.__file__).parent / "programs").glob("*.py"))
DTYPES = {"float16", "bfloat16", "float32", "float8e4nv", "int8", "uint8", "int32", "int64", "uint16"}


def faults(source: str) -> list[str]:
    """What Triton 3.2 refuses, or compiles to something else."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BoolOp) and len(node.values) > 2:
            found.append(f"{node.lineno}: a chain of 'and' or 'or' without parentheses")
        if isinstance(node, ast.Compare) and len(node.ops) > 1:
            found.append(f"{node.lineno}: a chain of comparisons")
        if isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and node.left.attr in DTYPES:
            found.append(f"{node.lineno}: a dtype left of a comparison is equal to no constant")
    return found


def untold_sums(source: str) -> list[int]:
    """Lines of matrix products that go on from a sum but do not say of what dtype it is, which is not float32."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and len(node.args) > 2]
    products = [call for call in calls if isinstance(call.func, ast.Attribute) and call.func.attr == "dot"]
    return [call.lineno for call in products if "out_dtype" not in {word.arg for word in call.keywords}]


def test_sums_of_whole_numbers_say_so() -> None:
    """Triton 3.6 (of torch 2.11) takes the sums of ``tl.dot`` for float32 unless it is told, and refuses others."""
    source = next(path for path in PROGRAMS if path.name == "integer.py").read_text(encoding="utf-8")
    assert source.count("tl.dot(") == 2 and untold_sums(source) == []
    assert untold_sums("x = tl.dot(a, b, c)") == [1] and untold_sums("x = tl.dot(a, b)") == []


def test_every_program_is_looked_at() -> None:
    assert {"linear.py", "integer.py", "attention.py", "append.py", "fp8.py"} <= {path.name for path in PROGRAMS}


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_programs_keep_to_the_oldest_triton(path: Path) -> None:
    assert faults(path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("line", ["x = a and b and c", "x = a < b < c", "x = tl.float16 == DTYPE"])
def test_the_check_can_fail(line: str) -> None:
    assert len(faults(line)) == 1
    assert faults("x = (a and b) and (DTYPE == tl.float16)") == []
