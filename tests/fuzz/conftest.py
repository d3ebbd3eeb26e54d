"""Where the fuzzers write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.formats.layers import scratch_directory


@pytest.fixture
def workplace() -> Iterator[Path]:
    """An empty directory, in memory if there is such a place."""
    with scratch_directory() as folder:
        yield folder
