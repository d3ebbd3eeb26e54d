"""Small models with their tokenizer, in memory and in directories."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = [f"w{number}" for number in range(60)]
MakeModel = Callable[..., LlamaForCausalLM]


def make_model(seed: int = 0, **fields: object) -> LlamaForCausalLM:
    """A random Llama of two layers with a vocabulary of 64; sharp enough that its predictions differ."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **({"vocab_size": 64, "num_hidden_layers": 2, "max_position_embeddings": 64} | sizes | fields),
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def save_model(directory: Path, seed: int = 0, words: list[str] | None = None, **fields: object) -> Path:
    """Such a model as a checkpoint, with a tokenizer of one token for each word."""
    make_model(seed, **fields).save_pretrained(directory)
    tokenizer = Tokenizer(
        models.WordLevel({word: number for number, word in enumerate(words or WORDS)}, unk_token="w0")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


@pytest.fixture
def model() -> LlamaForCausalLM:
    return make_model()


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float checkpoint; tests read it and never write to it."""
    return save_model(tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 words in a file."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(random.Random(0).choices(WORDS, k=200)))
    return path


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test has a cache of its own."""
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "cache"))
