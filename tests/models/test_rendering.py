"""Chat templates are programs of others: they end, and what they make has a size."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator

import pytest

from bitwright.core.errors import BitwrightError
from bitwright.models import rendering
from bitwright.models.embedded_model import embedded_directory
from bitwright.models.hf import Tokenizer, load_tokenizer
from bitwright.models.prompts import encode_chat, encode_messages
from bitwright.models.rendering import OutOfBoundsError, bounded

EVERY = "{% for a in range(100000) %}"
GROWING = (
    "{% set n = namespace(text='x') %}{% for a in range(64) %}{% set n.text = STEP %}{% endfor %}{{ n.text|length }}"
)


@pytest.fixture
def tokenizer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tokenizer]:
    """Of the embedded model, which may take a quarter of a second."""
    monkeypatch.setattr(rendering, "SECONDS", 0.25)
    yield load_tokenizer(embedded_directory())
    assert sys.gettrace() is None or "watch" not in repr(sys.gettrace()), "nothing is watched afterwards"


def refused(tokenizer: Tokenizer, template: str, why: str) -> None:
    before = time.monotonic()
    tokenizer.chat_template = template
    with pytest.raises(BitwrightError, match=rf"BW312\]: the chat template is stopped: {why}"):
        encode_chat(tokenizer, "Hello")
    assert time.monotonic() - before < 5


@pytest.mark.parametrize(
    "template",
    [
        EVERY * 3 + "{% endfor %}" * 3,
        EVERY + EVERY.replace("a", "b", 1) + "{{ messages[0].content }}" + "{% endfor %}" * 2,
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ range(100000)|select('in', range(100000)|list)|list|length }}",
    ],
    ids=["loops", "text", "macro", "filter"],
)
def test_a_template_without_end_is_ended(tokenizer: Tokenizer, template: str) -> None:
    refused(tokenizer, template, r"it takes longer than 0\.25 seconds")


@pytest.mark.parametrize("step", ["n.text ~ n.text", "n.text + n.text", "n.text|replace('x', 'xx')", "n.text * 2"])
def test_text_that_doubles_is_ended(tokenizer: Tokenizer, step: str) -> None:
    refused(tokenizer, GROWING.replace("STEP", step), "it makes a text of more than 4000000 characters")


@pytest.mark.parametrize(
    "template", ["{{ 'x' * 4000001 }}", "{{ 'x'|center(4000001)|length }}", "{{ 'x'.ljust(5000000) }}"]
)
def test_a_text_that_is_too_long_is_not_encoded(tokenizer: Tokenizer, template: str) -> None:
    refused(tokenizer, template, "it makes a text of more than 4000000 characters")


@pytest.mark.skipif(not rendering._resident(), reason="the system does not tell the memory of a process")
def test_memory_has_a_bound(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "MOST_MEMORY", 64 << 20)
    monkeypatch.setattr(rendering, "SECONDS", 60.0)
    step = "{% set n.all = n.all + [('x' ~ a) * 100000] %}"
    refused(tokenizer, "{% set n = namespace(all=[]) %}" + EVERY + step + "{% endfor %}", "it takes more than 64 MiB")


def test_the_bounds_are_known_to_every_conversation(tokenizer: Tokenizer) -> None:
    with pytest.raises(BitwrightError, match=r"BW312.*stopped"):
        encode_messages(tokenizer, [("user", "a"), ("assistant", "")], template=EVERY * 3 + "{% endfor %}" * 3)


def test_long_messages_are_rendered_as_ever(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 60.0)
    said = [(("user", "assistant")[turn % 2], f"{turn}: one more line\n" * 200) for turn in range(51)]
    conversation = [{"role": role, "content": text} for role, text in said]
    expected = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=False)
    assert encode_messages(tokenizer, said) == expected
    assert len(encode_chat(tokenizer, "x" * 200_000)) > 1000


def test_time_that_others_take_does_not_count() -> None:
    """Nor does what a machine that is busy, or was asleep, makes anybody wait."""
    with bounded(seconds=0.1):
        for _ in range(10):
            time.sleep(0.03)
            sorted([2, 1], key=lambda number: -number)


def test_a_long_text_has_time_and_memory_of_its_own(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendering, "SECONDS", 0.0)
    said = [("user", "one more word " * 8_000)]
    assert len(encode_messages(tokenizer, said)) > 1000, "two seconds for 112 thousand letters"
    monkeypatch.setattr(rendering, "LETTERS_A_SECOND", 1 << 30)
    with pytest.raises(BitwrightError, match=r"BW312.*takes longer than 0 seconds"):
        encode_messages(tokenizer, said)


@pytest.mark.parametrize("ends", [True, False])
def test_another_trace_function_is_put_back(ends: bool) -> None:
    seen: list[str] = []

    def debugger(_frame: object, event: str, _argument: object) -> None:
        seen.append(event)

    before = sys.gettrace()
    sys.settrace(debugger)
    try:
        if ends:
            with bounded():
                sorted([2, 1], key=lambda number: -number)
        else:
            with pytest.raises(OutOfBoundsError), bounded(seconds=0.0):
                for _ in range(10):
                    sorted([2, 1], key=lambda number: -number)
        after = sys.gettrace()
        seen.clear()
        sorted([2, 1], key=lambda number: -number)
    finally:
        sys.settrace(before)
    assert after is debugger and "call" in seen


def test_any_thread_may_render_and_no_other_is_watched(tokenizer: Tokenizer) -> None:
    """Two threads are ended while this one goes on for longer than they may."""
    found, before = list[str](), sys.gettrace()

    def render() -> None:
        try:
            encode_messages(tokenizer, [("user", "a")], template=EVERY * 3 + "{% endfor %}" * 3)
        except BitwrightError as error:
            found.append(str(error))

    threads = [threading.Thread(target=render) for _ in range(2)]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 0.4
    while time.monotonic() < end or any(thread.is_alive() for thread in threads):
        assert sys.gettrace() is before
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert len(found) == 2 and all("longer than 0.25 seconds" in text for text in found)


def test_what_catches_exceptions_does_not_catch_the_end() -> None:
    def stubborn() -> None:
        while True:
            try:
                time.sleep(0)
            except Exception:
                continue

    with pytest.raises(OutOfBoundsError, match=r"longer than 0\.05 seconds"), bounded(seconds=0.05):
        stubborn()
