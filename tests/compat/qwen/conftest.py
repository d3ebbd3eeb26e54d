"""Int4 and Int8 GPTQ checkpoints: of the embedded model, written by ``bitwright quantize``, and of the first Qwen."""

from __future__ import annotations

from pathlib import Path

import pytest

from bitwright.quantization.api import quantize
from tests.models.fused_models import quantized
from tests.models.vocabularies import learned_ranks, write_qwen


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("gptq")
    for name, scheme in {"Int4": "w4g64", "Int8": "w8g64-asym"}.items():
        quantize("demo:", folder / name, scheme=scheme, algorithm="rtn", format="gptq")
    return {name: folder / name for name in ("Int4", "Int8")}


@pytest.fixture(scope="session")
def first_qwen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """With the files that a Qwen-7B-Chat-Int4 or -Int8 has, but for its code; of random numbers."""
    folder, ranks = tmp_path_factory.mktemp("first"), learned_ranks(700, 0)
    for name, scheme in {"Int4": "w4g32", "Int8": "w8g32"}.items():
        sizes = {"vocab_size": 960, "seq_length": 512, "max_position_embeddings": 512}
        made = quantized(folder / name, "qwen", "gptq", scheme, torch_dtype=None, **sizes)
        config = (made.directory / "config.json").read_text()
        write_qwen(made.directory, ranks, chat_format="chatml", eos_token_id=700, max_window_size=6144)
        (made.directory / "config.json").write_text(config)
    return {name: folder / name for name in ("Int4", "Int8")}
