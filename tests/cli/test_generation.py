"""``bitwright generate`` prints what ``bitwright.generate`` returns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bitwright
from bitwright.cli import generation, main

PROMPT = "Once upon a time"


def test_text_is_printed_as_it_is(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = bitwright.generate(quantized, PROMPT, max_tokens=12)
    assert main(["generate", str(quantized), PROMPT, "--max-tokens", "12"]) == 0
    assert capsys.readouterr().out == text + "\n"


def test_sampling_options_arrive(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--max-tokens", "12", "--temperature", "1.5", "--top-p", "0.9", "--seed"]
    texts = []
    for seed in ("1", "1", "2"):
        assert main(["generate", str(quantized), PROMPT, *options, seed]) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    expected = bitwright.generate(quantized, PROMPT, max_tokens=12, temperature=1.5, top_p=0.9, seed=2)
    assert texts[2] == expected + "\n"


def test_chat_uses_the_template(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = bitwright.generate(quantized, "Tell me a story.", max_tokens=8, chat=True)
    assert main(["generate", str(quantized), "Tell me a story.", "--max-tokens", "8", "--chat"]) == 0
    assert capsys.readouterr().out == expected + "\n"
    assert expected != bitwright.generate(quantized, "Tell me a story.", max_tokens=8)


def test_json(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", str(quantized), PROMPT, "--max-tokens", "5", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["text"] == bitwright.generate(quantized, PROMPT, max_tokens=5)
    assert record["prompt"] == PROMPT


def test_a_model_cannot_move_the_cursor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    generation._print_piece("a\x1b[2Jb\n\tc\x07")
    assert capsys.readouterr().out == "a\\x1b[2Jb\n\tc\\x07"
