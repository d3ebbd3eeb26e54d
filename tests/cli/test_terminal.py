"""Foreign text is made harmless and laid out in columns."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.cli.terminal import printable, side_by_side


@given(st.text())
def test_nothing_that_a_terminal_obeys_is_left(text: str) -> None:
    shown = printable(text)
    assert all(char in "\t\n" or not (ord(char) < 32 or 127 <= ord(char) < 160) for char in shown)
    shown.encode()  # lone surrogates too would stop a stream
    if text.isprintable():
        assert shown == text


@pytest.mark.parametrize(("text", "shown"), [("a\x1b[31mb", "a\\x1b[31mb"), ("x\ry", "x\\ry"), ("\u202e", "\\u202e")])
def test_control_characters_are_spelled_out(text: str, shown: str) -> None:
    assert printable(text) == shown


def test_two_columns() -> None:
    text = side_by_side(("left", "one two three four"), ("right", "five\n\nsix"), width=23)
    assert text.splitlines() == [
        "left       | right",
        "---------- | ----------",
        "one two    | five",
        "three four |",
        "           | six",
    ]
