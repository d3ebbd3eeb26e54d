"""``bitwright chat``: what is typed, what is shown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitwright.cli import main
from bitwright.models import conversation


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that the user types; then Ctrl-D."""
    lines: list[str] = []

    def read(prompt: str) -> str:
        if not lines:
            raise EOFError
        line = lines.pop(0)
        if line == "^C":
            raise KeyboardInterrupt
        return line

    monkeypatch.setattr("builtins.input", read)
    return lines


def test_a_conversation(typed: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "chat.json"
    typed += ["/help", "Tell me a story.", "And then?", "/stats", f"/save {file}", "/clear", "/stats", "/exit"]
    assert main(["chat", "demo:", "--kv-cache", "int4-rotated", "--max-tokens", "9", "--system", "Be kind."]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("demo:; cache scheme int4-rotated\n")
    assert shown.count("tokens/s;") == 2
    assert "kept)" in shown
    assert "2 answers" in shown
    assert "/system TEXT" in shown
    messages = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]


def test_settings(typed: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    typed += ["/set", "/set temperature 0.5", "/set max_tokens 3", "/set temperature x", "/set size 3", "/system Hush."]
    typed += ["/nothing", "/save", "", "^C"]
    assert main(["chat", "demo:"]) == 0
    shown = capsys.readouterr().out
    assert "temperature 0, top_p 1" in shown
    assert "temperature 0.5, top_p 1, seed 0, max_tokens 3" in shown
    assert "temperature is 'x'" in shown
    assert "no setting 'size'" in shown
    assert "system message set" in shown
    assert "no command /nothing" in shown
    assert "/save needs" in shown
    assert "/exit leaves" in shown


def test_ctrl_c_stops_the_answer_and_not_the_program(
    typed: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object, **options: object) -> Iterator[str]:
        yield "Once "
        raise KeyboardInterrupt

    monkeypatch.setattr(conversation, "stream_text", interrupted)
    typed += ["Tell me a story.", "/stats"]
    assert main(["chat", "demo:"]) == 0
    shown = capsys.readouterr().out
    assert "Once  (stopped)" in shown
    assert "1 answers" in shown


@pytest.mark.parametrize(
    ("more", "status", "told"),
    [
        (["--quant-policy", "5"], 2, "0 or none; 4"),
        (["--quant-policy", "int3"], 2, "int8"),
        (["--quant-policy", "4"], 4, "bitwright calibrate"),
        (["--kv-cache", "int8", "--quant-policy", "8"], 2, "both given"),
        (["--model-format", "awq"], 2, "weights are float"),
        (["--model-format", "onnx"], 2, "hf, awq, gptq"),
        (["another"], 2, "one model"),
    ],
)
def test_what_cannot_be_is_said_before_anybody_types(
    more: list[str], status: int, told: str, typed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """E8."""
    assert main(["chat", "demo:", *more]) == status
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(("policy", "scheme"), [("0", "none"), ("none", "none"), ("8", "int8"), ("int8", "int8")])
def test_policies_say_what_they_mean(
    policy: str, scheme: str, typed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """E8."""
    assert main(["chat", "turbomind", "demo:", "--model-format", "hf", "--quant-policy", policy]) == 0
    assert scheme in capsys.readouterr().out.splitlines()[0]
