"""A conversation with a model, in the way of Qwen: what was said goes in, what was said and the answer come out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bitwright.core.errors import ArgumentError
from bitwright.models.generation import Sampling, stream_text
from bitwright.models.hf import PreTrainedModel, Tokenizer
from bitwright.models.prompts import encode_messages
from bitwright.models.qwen_vocabulary import CHATML, END_OF_TURN, START_OF_TURN

__all__ = ["chat", "chat_stream"]

SYSTEM = "You are a helpful assistant."


def chat(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    query: str,
    history: Sequence[tuple[str, str]] | None = None,
    *,
    system: str | None = None,
    stream: bool = False,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> tuple[str, list[tuple[str, str]]]:
    """The answer to ``query``, and the history with both at its end. The caller's history is left as it is.

    Args:
        model: of which this is a method.
        history: ``(query, answer)`` of each turn so far, oldest first.
        system: the message before the first turn; if not given, what the chat template puts there. Without a template
            the conversation is laid out as Qwen's models were taught, with the usual message.
        stream: not here: see :func:`chat_stream`.
        max_new_tokens: at most; if not given, 128 or what is left of the context.
        temperature: 0 for the likeliest token at each step.

    Raises:
        BitwrightError: BW201 for an argument, BW312 if the chat template fails, BW403 if the conversation does not fit
            the context.
    """
    if stream is not False:
        what = f"stream is {stream!r}, but chat answers as a whole"
        raise ArgumentError("BW201", what, suggestion="chat_stream(...) gives the answer as it grows")
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    answer = "".join(_pieces(model, tokenizer, query, history, system, max_new_tokens, sampling))
    return answer, [*(history or ()), (query, answer)]


def chat_stream(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    query: str,
    history: Sequence[tuple[str, str]] | None = None,
    *,
    system: str | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """The answer that :func:`chat` gives, as it grows: each text begins with the one before it.

    Raises:
        BitwrightError: as :func:`chat`; arguments are checked at once, the rest with the first text.
    """
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    return _prefixes(_pieces(model, tokenizer, query, history, system, max_new_tokens, sampling))


def _prefixes(pieces: Iterator[str]) -> Iterator[str]:
    text = ""
    for piece in pieces:
        text += piece
        yield text


def _pieces(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    query: str,
    history: Sequence[tuple[str, str]] | None,
    system: str | None,
    max_new_tokens: int | None,
    sampling: Sampling,
) -> Iterator[str]:
    if max_new_tokens is not None and (type(max_new_tokens) is not int or max_new_tokens < 1):
        raise ArgumentError("BW201", f"max_new_tokens is {max_new_tokens!r}", suggestion="a whole number, at least 1")
    template = None if tokenizer.chat_template else CHATML
    if system is None and template is not None:
        system = SYSTEM
    messages = [] if system is None else [("system", system)]
    for turn in _turns(history):
        messages += [("user", turn[0]), ("assistant", turn[1])]
    tokens = encode_messages(tokenizer, [*messages, ("user", query)], template=template)
    vocabulary = tokenizer.get_vocab()
    ends = [vocabulary[token] for token in (START_OF_TURN, END_OF_TURN) if token in vocabulary]
    return stream_text(model, tokenizer, tokens, max_tokens=max_new_tokens, sampling=sampling, ends=ends)


def _turns(history: object) -> Sequence[tuple[str, str]]:
    """The history, checked."""
    if history is None:
        return ()
    is_list = isinstance(history, list | tuple)
    if not isinstance(history, list | tuple) or not all(
        isinstance(turn, list | tuple) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in history
    ):
        what = f"history is {'a ' + type(history).__name__ if not is_list else 'not of pairs of texts'}"
        raise ArgumentError("BW201", what, suggestion="None, or a list of (query, answer)")
    return history
