"""Int4 and Int8 GPTQ checkpoints of the embedded model, as ``bitwright quantize`` writes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitwright.quantization.api import quantize


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gptq")
    for name, scheme in {"Int4": "w4g64", "Int8": "w8g64-asym"}.items():
        quantize("demo:", folder / name, scheme=scheme, algorithm="rtn", format="gptq")
    return {name: folder / name for name in ("Int4", "Int8")}
