"""What the tests of these names share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="session")
def document() -> str:
    """The text of the Neural Compressor document; the test is skipped where it is absent."""
    path = Path(__file__).resolve().parents[4] / "shared" / "seeds" / "neural_compressor_weight_only.md"
    if not path.is_file():
        pytest.skip("no document: it is looked for in a folder 'shared/seeds' beside the repository")
    return path.read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiny models gain nothing from threads, and no power cut comes during a test."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    yield
    torch.set_num_threads(threads)
