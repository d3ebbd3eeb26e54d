"""Conversations: the cache is kept from turn to turn, and says nothing else than a new one."""

from __future__ import annotations

import pytest
import torch

from bitwright.core.errors import BitwrightError
from bitwright.core.kv_scheme import parse_kv
from bitwright.models.conversation import Conversation
from bitwright.models.loading import load_with_tokenizer

QUESTIONS = ("Tell me a story.", "Who is the fox?", "Say it again.")


def converse(scheme: str, *, keep: bool = True, system: str | None = None) -> Conversation:
    # In float32: bf16 rounds a token's keys otherwise alone than in a prompt, and a code may flip.
    model, tokenizer = load_with_tokenizer("demo:", dtype=torch.float32)
    conversation = Conversation(model, tokenizer, parse_kv(scheme), system=system)
    conversation.max_tokens = 12
    for question in QUESTIONS:
        "".join(conversation.answer(question))
        if not keep:
            conversation._cache, conversation._known = None, []
    return conversation


@pytest.mark.parametrize("scheme", ["none", "int8", "int4-rotated"])
def test_a_kept_cache_answers_as_a_new_one(scheme: str) -> None:
    kept, anew = converse(scheme), converse(scheme, keep=False)
    assert kept.messages == anew.messages
    assert [role for role, _ in kept.messages] == ["user", "assistant"] * 3
    assert kept.turns[2].kept > 10
    assert [turn.kept for turn in anew.turns] == [0, 0, 0]
    assert kept.turns[1].read + kept.turns[1].kept == anew.turns[1].read
    assert all(0 < turn.written <= 12 and turn.cache_bytes > 0 for turn in kept.turns)


def test_schemes_that_cannot_be_cropped_begin_anew() -> None:
    assert converse("int2").messages


def test_an_answer_that_is_broken_off_belongs_to_the_conversation() -> None:
    model, tokenizer = load_with_tokenizer("demo:")
    conversation = Conversation(model, tokenizer, parse_kv("int8"))
    pieces = conversation.answer(QUESTIONS[0])
    first = next(pieces)
    pieces.close()  # type: ignore[attr-defined]
    assert conversation.messages == [("user", QUESTIONS[0]), ("assistant", first)]
    conversation.max_tokens = 4
    assert "".join(conversation.answer(QUESTIONS[1]))


def test_what_does_not_fit_leaves_the_conversation_as_it_was() -> None:
    conversation = converse("int8")
    before = list(conversation.messages)
    with pytest.raises(BitwrightError) as refused:
        "".join(conversation.answer("word " * 600))
    assert refused.value.code == "BW403"
    assert conversation.messages == before
    conversation.forget()
    assert not conversation.messages
    assert conversation.cache_bytes == 0


def test_static_schemes_need_calibration_at_once() -> None:
    model, tokenizer = load_with_tokenizer("demo:")
    with pytest.raises(BitwrightError, match="calibrate"):
        Conversation(model, tokenizer, parse_kv("int8-static"))
