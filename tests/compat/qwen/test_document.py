"""The code of Qwen's document on quantization runs: read from it, with its import paths and model names replaced."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import bitwright.compat.qwen
from bitwright.core.errors import Notice

DOCUMENT = Path(__file__).resolve().parents[4] / "shared" / "seeds" / "qwen_quantization.md"
MODEL_NAME = re.compile(r'"Qwen/[\w.-]+-(Int4|Int8)"')


@pytest.fixture(scope="module")
def weight_blocks() -> list[str]:
    """The blocks of Python that are of weights; those of the cache of keys and values are not."""
    if not DOCUMENT.is_file():
        pytest.skip("no document: it is looked for in a folder 'shared/seeds' beside the repository")
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [block for block in blocks if "use_cache_quantization" not in block]


@pytest.mark.parametrize("bits", ["Int4", "Int8"])
@pytest.mark.parametrize("kind", ["checkpoints", "first_qwen"])
def test_the_blocks_run(weight_blocks: list[str], request: pytest.FixtureRequest, kind: str, bits: str) -> None:
    """What a block uses and no block makes are the classes that it imports elsewhere, and the tokenizer."""
    assert weight_blocks
    folder = request.getfixturevalue(kind)[bits]
    for block in weight_blocks:
        code, replaced = MODEL_NAME.subn(lambda match: repr(str(folder)), block)
        assert replaced
        names: dict[str, Any] = {
            "AutoModelForCausalLM": bitwright.compat.qwen.AutoModelForCausalLM,
            "tokenizer": bitwright.compat.qwen.AutoTokenizer.from_pretrained(folder),
        }
        with pytest.warns(Notice, match="trust_remote_code"):
            exec(compile(code, str(DOCUMENT), "exec"), names)
        response, history = names["response"], names["history"]
        assert isinstance(response, str) and (response.strip() or kind == "first_qwen")
        assert history == [("Hi", response)]
