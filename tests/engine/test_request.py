"""One request by itself: how it ends."""

from __future__ import annotations

import pytest

from bitwright.engine.answer_text import AnswerText
from bitwright.engine.handle import RequestHandle
from bitwright.engine.options import RequestOptions
from bitwright.engine.request import Request
from bitwright.engine.sampler import Sampler


class Spelling:
    """A tokenizer whose token 2 is a letter and half a character."""

    def decode(self, tokens: list[int], **_: object) -> str:
        parts = {0: b"x", 1: b"y", 2: b"a\xc3"}
        return b"".join(parts[token] for token in tokens).decode("utf-8", errors="replace")


@pytest.mark.parametrize(("stop", "reason", "text"), [("ya", "stop", "x"), ("never", "length", "xya")])
def test_a_stop_that_the_last_token_brings_is_the_reason(stop: str, reason: str, text: str) -> None:
    """The letter is held back with its half of a character, until no more tokens come."""
    options = RequestOptions(stop=stop)
    request = Request(
        handle=RequestHandle(1, lambda _: None), options=options, tokens=[0], prompt_length=1, limit=3, seed=0,
        ends=frozenset(), sampler=Sampler(options, [0], 0), text=AnswerText(Spelling(), [0], options.stop),  # type: ignore[arg-type]
    )  # fmt: skip
    reasons = [request.append(token, None) for token in (0, 1, 2)]
    assert reasons == [None, None, reason]
    completion = request.completion(reasons[-1])  # type: ignore[arg-type]
    assert completion.text == text and completion.stopped_by == (stop if reason == "stop" else None)
