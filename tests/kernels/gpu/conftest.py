"""Programs run under Triton's interpreter, on CPU tensors: correct or not, but never fast."""

from __future__ import annotations

import importlib.util

import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    from tests.kernels.gpu.interpreting import teach_bfloat16

    teach_bfloat16()


@pytest.fixture
def interpreted() -> None:
    """The test needs Triton, which is an optional dependency."""
    if not HAS_TRITON:
        pytest.skip("Triton is not installed: pip install 'bitwright[gpu]'")
