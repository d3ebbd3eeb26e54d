"""The fuzzer of safetensors files: a short run by default, the whole one where slow tests are asked for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest

from bitwright.core.errors import BitwrightError
from bitwright.formats import safetensors_index
from tests.fuzz import fuzz_safetensors
from tests.fuzz.mutations import MUTATIONS, SEEDS, build_file

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("count", [3_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_mutated_files_give_an_index_or_our_error_in_little_memory(count: int) -> None:
    command = [sys.executable, "-m", "tests.fuzz.fuzz_safetensors", "--count", str(count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["files"] == count and result["peak_bytes"] < 200e6
    # The mutations reach far in: many are accepted, and those that are not break many rules.
    assert result["valid"] > count // 50 and result["rules"] >= 30


def test_a_reader_that_accepts_too_much_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the fuzzer: without the check of overlaps and gaps it fails within a few hundred files."""
    monkeypatch.setattr(safetensors_index, "_check_coverage", lambda *arguments: None)
    with pytest.raises(AssertionError):
        fuzz_safetensors.fuzz(2_000, 0)


def test_a_reader_that_lets_others_errors_escape_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_index, "_refuse", lambda *arguments: int("no number"))
    with pytest.raises(ValueError, match="no number"):
        fuzz_safetensors.fuzz(100, 0)


def test_the_files_before_damage_are_valid_and_each_mutation_damages(workplace: Path) -> None:
    path = workplace / "x"
    for pairs, size in SEEDS:
        path.write_bytes(build_file(pairs, size))
        assert len(safetensors_index.read_index(path).tensors) >= 1
    for mutation in MUTATIONS:
        refused = 0
        for seed in range(25):
            random = Random(seed)
            path.write_bytes(mutation(build_file(*random.choice(SEEDS)), random))
            try:
                safetensors_index.read_index(path)
            except BitwrightError:
                refused += 1
        assert (refused > 4) == (mutation.__name__ != "keep_file"), mutation.__name__
