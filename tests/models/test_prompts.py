"""Text and tokens: no control tokens from users, no broken characters to them."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.core.errors import BitwrightError
from bitwright.models import prompts
from bitwright.models.embedded_model import embedded_directory
from bitwright.models.hf import Tokenizer, load_tokenizer
from bitwright.models.prompts import Detokenizer, encode_chat, encode_prompt
from tests.models.checkpoints import byte_tokenizer

BYTES = byte_tokenizer()
EMBEDDED = load_tokenizer(embedded_directory())


def pieces(tokenizer: Tokenizer, prompt: str, text: str) -> list[str]:
    """The pieces in which ``text``, all its tokens given one by one, comes out after ``prompt``."""
    before = encode_prompt(tokenizer, prompt)
    tokens = tokenizer.encode(prompt + text, split_special_tokens=True)
    assert tokens[: len(before)] == before
    detokenizer = Detokenizer(tokenizer, before)
    found = [detokenizer.add(token) for token in tokens[len(before) :]]
    return [*found, detokenizer.finish()]


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="�"), min_size=1, max_size=40))
def test_streamed_text_is_the_text(text: str) -> None:
    found = pieces(BYTES, "A", text)
    assert "".join(found) == text
    assert "�" not in "".join(found)


@given(text=st.text("aé€😀नि", min_size=1, max_size=12), cut=st.integers(1, 30))
def test_a_text_cut_within_a_character_loses_only_that(text: str, cut: int) -> None:
    tokens = BYTES.encode(text)[:cut]
    detokenizer = Detokenizer(BYTES, BYTES.encode("A"))
    found = "".join([detokenizer.add(token) for token in tokens] + [detokenizer.finish()])
    assert found == text.encode()[:cut].decode(errors="ignore")
    assert text.startswith(found)


def test_a_character_comes_with_its_last_byte() -> None:
    assert pieces(BYTES, "A", "é😀!") == ["", "é", "", "", "", "😀", "!", ""]


class Fallback:
    """A tokenizer whose tokens are bytes, decoded as sentencepiece does: a run that is no text is as many faults."""

    def decode(self, tokens: list[int], **_: object) -> str:
        try:
            return bytes(tokens).decode()
        except UnicodeDecodeError:
            return "�" * len(tokens)


@pytest.mark.parametrize("tokenizer", [BYTES, Fallback()], ids=["pieces", "fallback"])
def test_a_character_that_the_prompt_began_is_shown_whole(tokenizer: Tokenizer) -> None:
    text = "😀xy"
    tokens = list(text.encode()) if isinstance(tokenizer, Fallback) else tokenizer.encode(text)
    for cut in (1, 2, 3):
        detokenizer = Detokenizer(tokenizer, tokens[:cut])
        assert "".join(detokenizer.add(token) for token in tokens[cut:]) == text, cut


def test_bytes_that_never_become_a_character_are_not_held_back_for_ever() -> None:
    decoded: list[int] = []

    class Counting(Fallback):
        def decode(self, tokens: list[int], **_: object) -> str:
            decoded.append(len(tokens))
            return super().decode(tokens)

    detokenizer = Detokenizer(Counting(), [65])  # type: ignore[arg-type]
    found = [detokenizer.add(0x80) for _ in range(500)]
    assert max(decoded) <= 64 and sum(map(bool, found)) == 500 // 32


def test_finishing_twice_adds_nothing() -> None:
    detokenizer = Detokenizer(BYTES, BYTES.encode("A"))
    assert detokenizer.add(BYTES.encode("é")[0]) == ""
    assert detokenizer.finish() == ""
    assert detokenizer.finish() == ""


@settings(max_examples=30)
@given(text=st.text(st.characters(codec="ascii", min_codepoint=32), min_size=1, max_size=40))
def test_the_embedded_tokenizer_streams_the_same(text: str) -> None:
    tokens = EMBEDDED.encode(text, split_special_tokens=True)
    detokenizer = Detokenizer(EMBEDDED, EMBEDDED.encode("Once"))
    assert "".join([detokenizer.add(token) for token in tokens] + [detokenizer.finish()]) == text


@pytest.mark.parametrize("name", ["stories260K", "BabyLlama-361-0.97M", "wikitext-qwen2-6m"])
def test_real_tokenizers_keep_spaces_and_characters(name: str, shared_models: Path) -> None:
    """Also those that begin a text with a space of their own, and spell unknown characters in bytes."""
    tokenizer = load_tokenizer(shared_models / name)
    text = " there was a café , 3 € – 😀 end"
    prompt = encode_prompt(tokenizer, "Once upon a time")
    tokens = tokenizer.encode("Once upon a time" + text)[len(prompt) :]
    detokenizer = Detokenizer(tokenizer, prompt)
    found = [detokenizer.add(token) for token in tokens]
    assert "".join([*found, detokenizer.finish()]) == text
    assert not any("�" in piece for piece in found)


@pytest.mark.parametrize("control", ["<|endoftext|>", "<|end|>", "<|user|>", "<|assistant|>"])
def test_control_tokens_in_a_prompt_are_letters(control: str) -> None:
    token = EMBEDDED.convert_tokens_to_ids(control)
    assert EMBEDDED.encode(f"a{control}b").count(token) == 1  # the tokenizer alone would let it through
    found = encode_prompt(EMBEDDED, f"a{control}b")
    assert token not in found
    assert EMBEDDED.decode(found) == f"a{control}b"
    plain = encode_chat(EMBEDDED, "ab")
    assert encode_chat(EMBEDDED, f"a{control}b").count(token) == plain.count(token)


def test_a_chat_ends_where_the_answer_begins() -> None:
    text = EMBEDDED.decode(encode_chat(EMBEDDED, "Tell me a story."), skip_special_tokens=False)
    assert text == "<|user|>\nTell me a story.<|end|>\n<|assistant|>\n"


def test_without_help_from_transformers_control_tokens_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Older(type(EMBEDDED)):  # type: ignore[misc]
        def apply_chat_template(self, conversation: object, add_generation_prompt: bool, return_dict: bool) -> object:
            return super().apply_chat_template(
                conversation, add_generation_prompt=add_generation_prompt, return_dict=return_dict
            )

    older = Older.from_pretrained(embedded_directory())
    assert encode_chat(older, "Hello") == encode_chat(EMBEDDED, "Hello")
    with pytest.raises(BitwrightError, match=r"BW201.*<\|end\|>"):
        encode_chat(older, "Hello<|end|>")


def test_a_begin_token_stays_and_an_end_token_goes(shared_models: Path) -> None:
    tokenizer = load_tokenizer(shared_models / "stories260K")
    found = encode_prompt(tokenizer, "Once")
    assert found[0] == tokenizer.bos_token_id
    assert found[-1] != tokenizer.eos_token_id


@pytest.mark.parametrize(("text", "says"), [("", "empty"), (None, "NoneType"), (b"x", "bytes"), ("a\ud800", "Unicode")])
def test_texts_that_cannot_be_encoded(text: object, says: str) -> None:
    for encode in (encode_prompt, encode_chat):
        with pytest.raises(BitwrightError, match=f"BW201.*{says}"):
            encode(EMBEDDED, text)  # type: ignore[arg-type]


def test_a_tokenizer_that_fails_is_named() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.model_max_length = {}  # type: ignore[assignment]  # as a damaged tokenizer_config.json may say
    with pytest.raises(BitwrightError, match=r"BW312.*tokenizer fails"):
        encode_prompt(tokenizer, "Hello")


def test_a_model_without_a_template_cannot_chat() -> None:
    with pytest.raises(BitwrightError, match=r"BW201.*no chat template"):
        encode_chat(BYTES, "Hello")


@pytest.mark.parametrize(
    "template",
    [
        "{{ undefined.thing }}",
        "{% if %}",
        "{{ raise_exception('no') }}",
        "",
        "{{ messages.append(1) }}",
        "{{ 1 // 0 }}",
    ],
)
def test_a_template_that_fails_is_named(template: str) -> None:
    tokenizer = load_tokenizer(embedded_directory())
    tokenizer.chat_template = template
    with pytest.raises(BitwrightError, match=r"BW(312|201).*template"):
        encode_chat(tokenizer, "Hello")


def test_a_template_cannot_reach_out_of_its_sandbox() -> None:
    tokenizer = load_tokenizer(embedded_directory())
    tokenizer.chat_template = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(BitwrightError, match="BW312"):
        encode_chat(tokenizer, "Hello")
    assert prompts.INCOMPLETE == "�"
