"""Pieces of text: whole characters, nothing of a stop text, and together what a decoder makes of all tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.engine.answer_text import AnswerText
from bitwright.models.embedded_model import embedded_directory
from bitwright.models.hf import Tokenizer, load_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(Path(embedded_directory()))


class Spelling:
    """A tokenizer whose tokens are bytes."""

    def decode(self, tokens: list[int], **_: object) -> str:
        return bytes(tokens).decode("utf-8", errors="replace")


def pieces_of(text: str, stops: tuple[str, ...]) -> tuple[list[str], str | None]:
    answer = AnswerText(Spelling(), [ord(" ")], stops)  # type: ignore[arg-type]
    pieces = []
    for byte in text.encode():
        pieces.append(answer.add(byte))
        if answer.stopped_by is not None:
            return pieces, answer.stopped_by
    return [*pieces, answer.finish()], answer.stopped_by


@given(
    st.text(alphabet="abé漢🎉", max_size=20), st.lists(st.text(alphabet="abé🎉", min_size=1, max_size=4), max_size=3)
)
def test_pieces_end_before_the_first_stop(text: str, stops: list[str]) -> None:
    pieces, stopped_by = pieces_of(text, tuple(stops))
    assert "\ufffd" not in "".join(pieces)
    shown = "".join(pieces)
    found = [text.find(stop) for stop in stops if stop in text]
    if not found:
        assert shown == text and stopped_by is None
        return
    # Characters come one at a time, so that the stop which is complete first ends the answer.
    ends = {text.find(stop) + len(stop) for stop in stops if stop in text}
    assert stopped_by in stops and text.startswith(shown + stopped_by)
    assert len(shown) + len(stopped_by) == min(ends)


@given(st.text(alphabet="abc", max_size=12), st.text(alphabet="abc", min_size=2, max_size=5))
def test_nothing_of_a_stop_is_shown_before_it_is_clear(text: str, stop: str) -> None:
    answer, shown = AnswerText(Spelling(), [], (stop,)), ""  # type: ignore[arg-type]
    for end, letter in enumerate(text, 1):
        shown += answer.add(ord(letter))
        if answer.stopped_by is not None:
            break
        longest = max(n for n in range(len(stop)) if text[:end].endswith(stop[:n]) or n == 0)
        assert shown == text[: end - longest]


def test_characters_of_several_tokens(tokenizer: Tokenizer) -> None:
    text = "A smile 🙂 and naïve 漢字"
    prompt, tokens = tokenizer.encode("Once"), tokenizer.encode(text)
    answer = AnswerText(tokenizer, prompt, ())
    pieces = [answer.add(token) for token in tokens] + [answer.finish()]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)
    assert pieces.count("") > 5


def test_without_a_tokenizer_there_is_no_text() -> None:
    answer = AnswerText(None, [1], ())
    assert answer.add(3) == "" and answer.finish() == ""
