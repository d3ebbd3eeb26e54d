"""One quantized copy of the embedded model for all tests of the command line that only read it."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitwright.cli import main


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A w4g128 checkpoint of the embedded model; do not write to it."""
    output = tmp_path_factory.mktemp("quantized") / "w4"
    assert main(["quantize", "demo:", "-o", str(output), "--scheme", "w4g128", "--no-check"]) == 0
    return output
