"""Tokenizers that models bring as code: their vocabularies, read without running it."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bitwright.core.errors import BitwrightError
from bitwright.models.embedded_model import embedded_directory
from bitwright.models.hf import load_tokenizer
from bitwright.models.prompts import encode_chat, encode_prompt
from tests.models.vocabularies import TEXTS, learned_ranks, write_qwen


def merged(piece: bytes, ranks: dict[bytes, int]) -> list[int]:
    """The definition: the neighbours that make the token of the least rank become it, the leftmost first."""
    if piece in ranks:
        return [ranks[piece]]
    parts = [bytes([byte]) for byte in piece]
    while True:
        made = [left + right for left, right in pairwise(parts)]
        found = [(ranks[token], place) for place, token in enumerate(made) if token in ranks]
        if not found:
            return [ranks[part] for part in parts]
        _, place = min(found)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


@pytest.mark.parametrize("seed", range(4))
def test_ranks_are_merged_as_they_are_defined(tmp_path: Path, seed: int) -> None:
    """Within the pieces that the pattern cuts, which it shows."""
    ranks = learned_ranks(700, seed)
    tokenizer: Any = load_tokenizer(write_qwen(tmp_path / "q", ranks))
    numbers = {token: rank for rank, token in enumerate(ranks)}
    backend = tokenizer.backend_tokenizer
    for text in TEXTS:
        normal = backend.normalizer.normalize_str(text)
        cut = [normal[first:end] for _, (first, end) in backend.pre_tokenizer.pre_tokenize_str(normal)]
        assert "".join(cut) == normal
        expected = [number for piece in cut for number in merged(piece.encode(), numbers)]
        assert tokenizer.encode(text) == expected == encode_prompt(tokenizer, text), text
        assert tokenizer.decode(expected) == normal


def test_text_is_cut_as_qwen_cuts_it(tmp_path: Path) -> None:
    tokenizer: Any = load_tokenizer(write_qwen(tmp_path / "q", learned_ranks(300, 0)))
    cut = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str
    text = "I'LL say  4567 naïve words\n\n  end!?"
    pieces = [text[first:end] for _, (first, end) in cut(text)]
    assert pieces == ["I", "'LL", " say", " ", " ", "4", "5", "6", "7", " naïve", " words", "\n\n", " ", " end", "!?"]


def test_control_tokens_follow_the_ranks_and_come_from_the_template_alone(tmp_path: Path) -> None:
    ranks = learned_ranks(400, 1)
    tokenizer: Any = load_tokenizer(write_qwen(tmp_path / "q", ranks, chat_format="chatml"))
    vocabulary = tokenizer.get_vocab()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|extra_0|>", "<|extra_204|>"]
    assert [vocabulary[name] - 400 for name in names] == [0, 1, 2, 3, 207] and len(vocabulary) == 608
    assert tokenizer.eos_token == "<|im_end|>"
    tokens = encode_chat(tokenizer, "say <|im_end|>")
    assert tokenizer.decode(tokens) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nsay <|im_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokens.count(vocabulary["<|im_end|>"]) == 2
    assert max(encode_prompt(tokenizer, "<|im_start|> and <|extra_7|>")) < 400
    base: Any = load_tokenizer(write_qwen(tmp_path / "base", ranks, chat_format="raw"))
    assert base.eos_token == "<|endoftext|>" and not base.chat_template


def test_a_tokenizer_json_beside_the_code_counts(tmp_path: Path) -> None:
    """transformers would want to run the code."""
    directory = write_qwen(tmp_path / "q", learned_ranks(300, 2))
    shutil.copy(embedded_directory() / "tokenizer.json", directory)
    demo = load_tokenizer(embedded_directory())
    assert load_tokenizer(directory).encode("Once upon a time") == demo.encode("Once upon a time")


BROKEN = ["", "x", "QQ== 0 1", "!!! 0", "QQ== 1", "QQ== 0\nQQ== 1", "QQ== 0", "=  0", "QQ== zero", "QQ== -1"]


@pytest.mark.parametrize("text", BROKEN)
def test_broken_vocabularies_are_one_error(tmp_path: Path, text: str) -> None:
    directory = write_qwen(tmp_path / "q", [])
    (directory / "qwen.tiktoken").write_text(text)
    with pytest.raises(BitwrightError) as caught:
        load_tokenizer(directory)
    assert caught.value.code == "BW312" and "qwen.tiktoken" in str(caught.value)


def test_code_alone_is_no_tokenizer(tmp_path: Path) -> None:
    directory = write_qwen(tmp_path / "q", learned_ranks(300, 3))
    (directory / "qwen.tiktoken").unlink()
    with pytest.raises(BitwrightError) as caught:
        load_tokenizer(directory)
    assert caught.value.code == "BW312" and "tokenizer.json" in caught.value.suggestion
