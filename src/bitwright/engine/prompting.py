"""What a request asks, checked before it is taken up: its tokens, how many may follow, that it can be run at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.engine.options import RequestOptions, show
from bitwright.engine.scheduler import pages_of
from bitwright.models.limits import room
from bitwright.models.paged_cache import PAGE
from bitwright.models.prompts import encode_chat, encode_messages, encode_prompt

if TYPE_CHECKING:
    from bitwright.models.hf import Tokenizer

__all__ = ["Prompt", "check_length", "check_tokens", "encode", "room_of"]

Prompt: TypeAlias = str | Sequence[int] | Sequence[Mapping[str, str]]

UNUSUAL = 16  # characters a token: texts have a quarter of it


def encode(prompt: Prompt, tokenizer: Tokenizer | None, *, chat: bool) -> list[int]:
    """The tokens of a prompt: a text, tokens, or the messages of a conversation with ``role`` and ``content``.

    Raises:
        ArgumentError: BW201 if it is empty or of another kind.
        BitwrightError: BW312 if there is no tokenizer, or it fails.
    """
    if isinstance(prompt, str):
        tokenizer = _need(tokenizer)
        return encode_chat(tokenizer, prompt) if chat else encode_prompt(tokenizer, prompt)
    if not isinstance(prompt, Sequence) or isinstance(prompt, bytes):
        accepted = "a text, tokens, or messages with role and content"
        raise ArgumentError("BW201", f"the prompt is a {type(prompt).__name__}", suggestion=f"accepted: {accepted}")
    if not len(prompt):
        raise ArgumentError("BW201", "the prompt is empty", suggestion="give a text to continue")
    if all(isinstance(each, Mapping) for each in prompt):
        messages = [_message(each) for each in prompt]
        return encode_messages(_need(tokenizer), messages)
    return [_token(each) for each in prompt]


def check_length(prompt: Prompt, tokenizer: Tokenizer | None, context: int) -> None:
    """Refuse texts that cannot fit a context of so many tokens, however they are encoded: that would take long.

    No token stands for more characters than the longest of the vocabulary has.

    Raises:
        BitwrightError: BW403 if a text has more characters than so many of those.
    """
    if isinstance(prompt, str):
        letters = len(prompt)
    elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        letters = sum(len(_content(each)) for each in prompt)
    else:  # tokens, of which there may be many, or nothing that will be encoded
        return
    if tokenizer is None or letters <= UNUSUAL * context:
        return
    longest = max(map(len, tokenizer.get_vocab()), default=0)
    if letters > max(longest, UNUSUAL) * context:
        raise BitwrightError(
            "BW403",
            f"the prompt has {letters} characters; the context holds {context} tokens of at most {longest}",
            why="text is never cut off silently",
            suggestion="shorten the prompt",
        )


def _content(message: object) -> str:
    content = message.get("content") if isinstance(message, Mapping) else None
    return content if isinstance(content, str) else ""


def _message(message: object) -> tuple[str, str]:
    assert isinstance(message, Mapping)
    role, content = message.get("role"), message.get("content")
    if type(role) is not str or type(content) is not str or len(message) != 2:
        what = f"a message has {', '.join(map(str, message)) or 'nothing'}"
        raise ArgumentError("BW201", what[:200], suggestion="accepted: role and content, both texts")
    return role, content


def _token(token: object) -> int:
    if type(token) is not int:
        raise ArgumentError("BW201", f"the prompt has the token {show(token)}", suggestion="whole numbers")
    return token


def _need(tokenizer: Tokenizer | None) -> Tokenizer:
    if tokenizer is None:
        what = "the engine has no tokenizer, so that prompts are tokens"
        raise BitwrightError("BW312", what, suggestion="give tokenizer=... to the engine")
    return tokenizer


def check_tokens(tokens: Sequence[int], options: RequestOptions, vocabulary: int) -> None:
    """Refuse tokens that the model does not have.

    Raises:
        ArgumentError: BW201, naming the first.
    """
    for field, values in (("the prompt", tokens), ("logit_bias", options.logit_bias), ("stop_ids", options.stop_ids)):
        wrong = next((token for token in values if not 0 <= token < vocabulary), None)
        if wrong is not None:
            what = f"{field} has the token {show(wrong)}"
            raise ArgumentError("BW201", what, suggestion=f"from 0 to {vocabulary - 1}")


def room_of(prompt: int, max_tokens: int | None, max_length: int, pages: int) -> int:
    """How many tokens may be generated after so many of the prompt, in a cache of so many pages.

    Raises:
        BitwrightError: BW403 if they do not fit the context, or could never fit the cache.
    """
    limit = room(prompt, max_tokens, max_length)
    if max_tokens is None:
        limit = min(limit, max(1, pages * PAGE - prompt + 1))
    if pages_of(prompt + limit - 1) > pages:  # the last token is generated, and never computed
        raise BitwrightError(
            "BW403",
            f"the prompt has {prompt} tokens and {limit} are to be generated; the whole cache holds {pages * PAGE}",
            why="the request could never be run",
            suggestion="more cache_tokens or cache_memory, a shorter prompt, or fewer max_tokens",
        )
    return limit
