"""Text to tokens and back: what a user types never becomes a control token, and no character is shown in pieces."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.models.rendering import OutOfBoundsError, bounded

if TYPE_CHECKING:
    from bitwright.models.hf import Tokenizer

__all__ = ["Detokenizer", "encode_chat", "encode_messages", "encode_prompt"]

MOST_PENDING = 32  # tokens that are held back; a character has four bytes at most, and bytes without end are none
INCOMPLETE = "�"  # what a decoder shows for bytes that are not, or not yet, a character


def encode_prompt(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of ``text``, after the tokens with which the tokenizer begins a text, if any.

    Control tokens spelled out in the text are encoded as the letters that they are.

    Raises:
        ArgumentError: BW201 if the text is empty, gives no token, or is not valid Unicode.
        BitwrightError: BW312 if the tokenizer fails.
    """
    _check_text(text)
    try:
        plain = tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        tokens: list[int] = tokenizer.encode(text, split_special_tokens=True)
    except Exception as error:  # settings of the wrong kind show only now, as any exception
        what = f"the tokenizer fails: {type(error).__name__}: {error}"
        raise BitwrightError("BW312", what, suggestion="fetch the tokenizer files of the model again") from None
    if not plain:
        raise ArgumentError("BW201", "the prompt has no token", suggestion="give text in a language of the model")
    # Some tokenizers also end a text, and after its end there is nothing to continue.
    while len(tokens) > len(plain) and tokens[-len(plain) :] != plain:
        tokens = tokens[:-1]
    return tokens


def encode_chat(tokenizer: Tokenizer, text: str) -> list[int]:
    """The tokens of the tokenizer's chat template for one message of the user, up to where the answer begins.

    transformers renders the template in an immutable sandbox, within the bounds of :mod:`bitwright.models.rendering`.
    Control tokens come from the template alone.

    Raises:
        ArgumentError: BW201 if the text is empty or not valid Unicode, or the tokenizer has no chat template.
        BitwrightError: BW312 if the template fails, or passes a bound.
    """
    return encode_messages(tokenizer, [("user", text)])


def encode_messages(
    tokenizer: Tokenizer, messages: Sequence[tuple[str, str]], *, template: str | None = None
) -> list[int]:
    """As :func:`encode_chat`, for a conversation: ``(role, text)`` of each message, oldest first.

    ``template`` stands for the tokenizer's own.

    Raises:
        ArgumentError: BW201 if a text is empty or not valid Unicode, or the tokenizer has no chat template.
        BitwrightError: BW312 if the template fails, or passes a bound.
    """
    for role, text in messages:
        if text or role == "user":  # an answer may have been empty
            _check_text(text)
    if not tokenizer.chat_template and template is None:
        raise ArgumentError("BW201", "the model has no chat template", suggestion="prompt it without chat")
    options: dict[str, Any] = {"sanitize_control_tokens": True}
    if not inspect.signature(tokenizer.apply_chat_template).parameters.keys() >= options.keys():
        options = {}  # an older transformers, which would hand the option to the template
        for _, text in messages:
            _refuse_control_tokens(tokenizer, text)
    if template is not None:
        options["chat_template"] = template
    conversation = [{"role": role, "content": text} for role, text in messages]
    try:
        with bounded(letters=sum(len(text) for _, text in messages)):
            tokens = tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, return_dict=False, **options
            )
    except OutOfBoundsError as error:
        what, why = f"the chat template is stopped: {error}", "it is a program that came with the model"
        suggestion = "shorten messages that are as long themselves, or prompt the model without chat"
        raise BitwrightError("BW312", what, why=why, suggestion=suggestion) from None
    except Exception as error:  # a template is a program, and fails in as many ways
        what = f"the chat template fails: {type(error).__name__}: {error}"
        raise BitwrightError("BW312", what, suggestion="prompt the model without chat") from None
    if not isinstance(tokens, list) or not tokens:
        raise BitwrightError("BW312", "the chat template gives no token", suggestion="prompt the model without chat")
    return [int(token) for token in tokens]  # type: ignore[arg-type]


def _refuse_control_tokens(tokenizer: Tokenizer, text: str) -> None:
    found = [token for token in tokenizer.all_special_tokens if token in text]
    if found:
        what = f"the message spells the control token {found[0]!r}"
        raise ArgumentError("BW201", what, suggestion="remove it, or update transformers, which then reads it as text")


def _check_text(text: str) -> None:
    if not isinstance(text, str) or not text:
        found = "empty" if isinstance(text, str) else f"a {type(text).__name__}"
        raise ArgumentError("BW201", f"the prompt is {found}", suggestion="give a text to continue")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        what = f"the prompt is not valid Unicode at character {error.start}"
        raise ArgumentError("BW201", what, suggestion="remove the lone surrogate") from None


class Detokenizer:
    """The text of generated tokens, in pieces that end between characters.

    What a token adds to the text depends on those before it: on the prompt's last at first, later on those of the
    piece before. Tokens are held back while their bytes end within a character, so long as they may become one. A
    character that the prompt has begun is shown whole.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._before, self._pending = list(prompt), list[int]()
        self._text_before = self._decode(self._before)

    def add(self, token: int) -> str:
        """The text that ``token`` completes: empty while a character is incomplete."""
        self._pending.append(token)
        text = self._text()
        if not text or (text.endswith(INCOMPLETE) and len(self._pending) < MOST_PENDING):
            return ""
        # A piece that ends what was begun before it is no text without that.
        is_rest = self._text_before.endswith(INCOMPLETE) and not text.endswith(INCOMPLETE)
        begun = self._before if is_rest else []
        self._before, self._pending = begun + self._pending, []
        self._text_before = self._decode(self._before)
        return text

    def finish(self) -> str:
        """What was held back, without the bytes of an incomplete last character."""
        text = self._text() if self._pending else ""
        self._pending = []
        return text.rstrip(INCOMPLETE)

    def _text(self) -> str:
        before, whole = self._text_before, self._decode(self._before + self._pending)
        if not whole.startswith(before):  # bytes at the end of the prompt are a character now
            before = before.rstrip(INCOMPLETE)
        return whole[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text
