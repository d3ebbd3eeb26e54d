"""What the tests of the command line share: a quantized copy of the embedded model, and a tiny model to be damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bitwright.cli import main
from tests.cli.damaged_models import Folder
from tests.quantization.tiny import TEXT, save_model


@pytest.fixture(scope="session")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A w4g128 checkpoint of the embedded model; do not write to it."""
    output = tmp_path_factory.mktemp("quantized") / "w4"
    assert main(["quantize", "demo:", "-o", str(output), "--scheme", "w4g128", "--no-check"]) == 0
    return output


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A sound tiny model, a quantized one, and a text; copied by every case."""
    folder = Folder(tmp_path_factory.mktemp("faults"))
    save_model(folder.model)
    (folder.path / "text.txt").write_text(TEXT)
    assert main(["quantize", str(folder.model), "-o", str(folder.made), "--scheme", "w4g32", "--no-check"]) == 0
    return folder


@pytest.fixture
def folder(prepared: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    shutil.copytree(prepared.path, tmp_path / "case")
    monkeypatch.chdir(tmp_path / "case")
    return Folder(tmp_path / "case")
