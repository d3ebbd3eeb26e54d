"""Tokenizers that models bring as code: their vocabularies, read without running it."""

from __future__ import annotations

import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bitwright.core.errors import BitwrightError
from bitwright.models.coded_tokenizers import has_vocabulary
from bitwright.models.embedded_model import embedded_directory
from bitwright.models.hf import load_tokenizer
from bitwright.models.prompts import encode_chat, encode_prompt
from tests.models.vocabularies import TEXTS, learned_pieces, learned_ranks, write_internlm2, write_qwen


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


def test_a_token_that_nothing_is_merged_to_is_found_whole(tmp_path: Path) -> None:
    ranks = [bytes([byte]) for byte in range(256)] + [b"qjz"]
    tokenizer: Any = load_tokenizer(write_qwen(tmp_path / "q", ranks))
    assert tokenizer.encode("qjz") == [256] and tokenizer.encode("qjzq") == [*b"qjzq"]


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


def joined(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's definition: the neighbours whose piece has the highest score become it, the leftmost first."""
    parts = list(text)
    while True:
        made = [left + right for left, right in pairwise(parts)]
        found = [(-scores[piece], place) for place, piece in enumerate(made) if piece in scores]
        if not found:
            break
        _, place = min(found)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]
    return [
        piece for part in parts for piece in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])
    ]


@pytest.mark.parametrize(("seed", "prefix"), [(0, True), (1, True), (2, False), (3, False)])
def test_pieces_are_joined_as_they_are_defined(tmp_path: Path, seed: int, prefix: bool) -> None:
    pieces = learned_pieces(400, seed)
    tokenizer: Any = load_tokenizer(write_internlm2(tmp_path / "i", pieces, prefix=prefix))
    numbers = {text: number for number, (text, _, _) in enumerate(pieces)}
    scores = {text: score for text, score, kind in pieces if kind == 1}
    for text in TEXTS:
        expected = [
            numbers[piece] for piece in joined(("\u2581" if prefix else "") + text.replace(" ", "\u2581"), scores)
        ]
        assert tokenizer.encode(text) == [1, *expected], text
        assert tokenizer.decode(expected) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


def test_pieces_that_settings_rename_are_control_tokens(tmp_path: Path) -> None:
    pieces = [*learned_pieces(60, 0), ("[UNUSED_TOKEN_145]", -900.0, 1), ("[UNUSED_TOKEN_146]", -901.0, 1)]
    first = len(pieces) - 2
    renamed = {str(first): {"content": "<|im_end|>", "special": True}, "2": {"content": "</s>", "special": True}}
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    directory = write_internlm2(tmp_path / "i", pieces, added_tokens_decoder=renamed, chat_template=template)
    tokenizer: Any = load_tokenizer(directory)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == first and len(tokenizer.get_vocab()) == len(pieces)
    tokens = encode_chat(tokenizer, "a <|im_end|>")
    assert tokens[0] == 1 and tokens.count(1) == 1 and tokens[-1] == first and tokens.count(first) == 1
    assert first not in encode_prompt(tokenizer, "the <|im_end|>")
    bare = write_internlm2(tmp_path / "b", pieces, add_bos_token=False)
    assert load_tokenizer(bare).encode("a")[0] != 1


@pytest.mark.parametrize(
    "change",
    [
        lambda data: b"", lambda data: data[:-3], lambda data: data[: len(data) // 2], lambda data: b"\xff" * 30,
        lambda data: b"\x08\x01" + data, lambda data: data + b"\x0b", lambda data: data[:20] * 2, lambda data: b"{}",
    ],
)  # fmt: skip
def test_broken_models_of_pieces_are_one_error(tmp_path: Path, change: Any) -> None:
    directory = write_internlm2(tmp_path / "i", learned_pieces(30, 0))
    path = directory / "tokenizer.model"
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BitwrightError) as caught:
        load_tokenizer(directory)
    assert caught.value.code == "BW312" and "tokenizer.model" in str(caught.value)


def test_models_of_another_kind_are_refused(tmp_path: Path) -> None:
    directory = write_internlm2(tmp_path / "i", learned_pieces(30, 0), kind=1)
    with pytest.raises(BitwrightError, match=r"BW312.*not of merges"):
        load_tokenizer(directory)


def test_a_template_may_be_a_file_of_its_own(tmp_path: Path) -> None:
    directory = write_internlm2(tmp_path / "i", learned_pieces(60, 0), chat_template="of the settings")
    (directory / "chat_template.jinja").write_text("{{ messages[0].content }}")
    assert load_tokenizer(directory).chat_template == "{{ messages[0].content }}"
    (directory / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(BitwrightError, match=r"BW312.*chat_template\.jinja"):
        load_tokenizer(directory)
    with open(directory / "chat_template.jinja", "wb") as file:
        file.truncate(1 << 40)  # which is on no disk
    with pytest.raises(BitwrightError, match=r"BW312.*chat_template\.jinja.*larger than 64 MiB"):
        load_tokenizer(directory)


def test_what_holds_a_vocabulary(tmp_path: Path) -> None:
    for number, write in enumerate((write_internlm2, write_qwen)):
        directory = write(tmp_path / str(number), [])  # type: ignore[operator]
        assert has_vocabulary(directory)
        for path in (*directory.glob("*.model"), *directory.glob("*.tiktoken")):
            path.unlink()
        assert not has_vocabulary(directory)
    assert has_vocabulary(embedded_directory()) and not has_vocabulary(tmp_path)


def test_spaces_are_trimmed_where_the_model_says_so_or_says_nothing(tmp_path: Path) -> None:
    """The definition of the format fills in what a file leaves out: a text loses spaces, and no other white space."""
    pieces = learned_pieces(400, 0)
    scores = {text: score for text, score, kind in pieces if kind == 1}
    numbers = {text: number for number, (text, _, _) in enumerate(pieces)}
    for name, said in (("silent", b""), ("said", b"\x20\x01")):
        tokenizer: Any = load_tokenizer(write_internlm2(tmp_path / name, pieces, prepared=said))
        for text in ("  the  thing\n\n  that's   all  ", "a b", "\n a \n", "   "):
            kept = re.sub(" {2,}", " ", text.strip(" "))
            spelled = "\u2581" + kept.replace(" ", "\u2581") if kept else ""
            assert tokenizer.encode(text) == [1, *(numbers[piece] for piece in joined(spelled, scores))], text


@pytest.mark.parametrize("said", [b"\x28\x00", b"\x12\x01x"])
def test_texts_prepared_in_other_ways_are_refused(tmp_path: Path, said: bytes) -> None:
    directory = write_internlm2(tmp_path / "i", learned_pieces(30, 0), prepared=said)
    with pytest.raises(BitwrightError, match="BW312"):
        load_tokenizer(directory)


def test_small_files_do_not_grow_to_gigabytes(tmp_path: Path) -> None:
    """A token of one letter many times is made of any two that are as long together."""
    single, runs = [bytes([byte]) for byte in range(256)], [bytes(length) for length in range(2, 1025)]
    with pytest.raises(BitwrightError, match=r"BW312.*qwen\.tiktoken.*too many ways"):
        load_tokenizer(write_qwen(tmp_path / "q", single + runs))
    pieces = [(letter * length, -1.0, 1) for letter in "abcdef012345" for length in range(1, 257)]
    with pytest.raises(BitwrightError, match=r"BW312.*tokenizer\.model.*too many ways"):
        load_tokenizer(write_internlm2(tmp_path / "i", pieces))


def test_settings_name_pieces_by_numbers_that_are_any_text(tmp_path: Path) -> None:
    renamed = {key: {"content": "x"} for key in ("9" * 5000, "-1", "", "1.0", "99999999")}
    directory = write_internlm2(tmp_path / "i", learned_pieces(30, 0), added_tokens_decoder=renamed)
    assert "x" not in load_tokenizer(directory).get_added_vocab()
