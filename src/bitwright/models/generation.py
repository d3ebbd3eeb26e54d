"""Text from a model: greedy or sampled, token by token, with the cache of keys and values that transformers keeps."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.kv_scheme import KVScheme, parse_kv
from bitwright.models.hf import PreTrainedModel, Tokenizer, context_length, load_tokenizer
from bitwright.models.kv_cache import QuantizedCache
from bitwright.models.kv_trial import safe_scheme
from bitwright.models.limits import end_tokens, room
from bitwright.models.loading import check_vocabulary, load_with_tokenizer
from bitwright.models.prompts import Detokenizer, encode_chat, encode_prompt

__all__ = ["Sampling", "generate", "generate_tokens", "stream_text"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the next token is chosen: the likeliest (``temperature`` 0), or by chance from a seeded generator.

    Raises:
        ArgumentError: BW201, naming the field and what it may be.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, lambda value: 0 <= value < math.inf, "a finite number, 0 or more")
        _check("top_p", self.top_p, lambda value: 0 < value <= 1, "above 0 and at most 1")
        is_seed = type(self.seed) is int and 0 <= self.seed < 1 << 63
        if not is_seed:
            raise ArgumentError("BW201", f"seed is {self.seed!r}", suggestion="a whole number, 0 or more")

    def choose(self, logits: Tensor, generator: torch.Generator) -> int:
        """A token from its ``logits`` (``[vocabulary]``, any float dtype).

        Raises:
            BitwrightError: BW601 if a logit is NaN or the largest is infinite.
        """
        logits = logits.to("cpu", torch.float64)
        largest = logits.max()
        if not bool(torch.isfinite(largest)):
            advice = "the weights or the activations are broken; evaluate the model it was made from"
            raise BitwrightError("BW601", "the model gives logits that are not numbers", suggestion=advice)
        if self.temperature == 0:
            return int(logits.argmax())
        probabilities = ((logits - largest) / self.temperature).softmax(0)
        if self.top_p < 1:
            ordered, order = probabilities.sort(descending=True, stable=True)
            outside = ordered.cumsum(0) - ordered >= self.top_p  # the likeliest token is always inside
            probabilities[order[outside]] = 0
        return int(torch.multinomial(probabilities, 1, generator=generator))


def generate(
    model_or_path: PreTrainedModel | str | Path,
    prompt: str,
    *,
    max_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    chat: bool = False,
    kv_cache: str | int | KVScheme = "none",
    kv_safety: str = "warn",
    tokenizer: Tokenizer | None = None,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The model's continuation of ``prompt``, without the prompt.

    Args:
        model_or_path: what :func:`bitwright.load` takes or gives.
        max_tokens: how many tokens at most; if not given, 128 or what is left of the context.
        temperature: 0 for the likeliest token, else the divisor of the logits before sampling.
        top_p: sample among the fewest tokens that have this probability together.
        seed: equal seeds give equal texts.
        chat: put the prompt into the model's chat template, as a message of the user.
        kv_cache: how keys and values are stored: ``none`` (as computed), ``int8``, ``int4-rotated``, ...
        kv_safety: where 4 bits or less are unsafe: ``warn``, ``widen`` (take 8-bit codes there), ``off`` (do not try).
        tokenizer: instead of the one in the model's directory.
        on_text: called with each piece of text as it comes; a piece never ends within a character.

    Raises:
        BitwrightError: BW201 for an argument, BW312 without a tokenizer, BW403 if the prompt and ``max_tokens`` do not
            fit the context (nothing is cut), BW601 if the model gives NaN; and what :func:`bitwright.load` raises.

    Example:
        >>> bitwright.generate("demo:", "Once upon a time", max_tokens=40)
    """
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    scheme = kv_cache if isinstance(kv_cache, KVScheme) else parse_kv(kv_cache)
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise ArgumentError("BW201", f"max_tokens is {max_tokens!r}", suggestion="a whole number, at least 1")
    model, tokenizer = _resolve(model_or_path, tokenizer)
    tokens = encode_chat(tokenizer, prompt) if chat else encode_prompt(tokenizer, prompt)
    pieces: list[str] = []
    scheme = safe_scheme(model, scheme, kv_safety, tokenizer=tokenizer)
    cache = None if scheme.is_float else QuantizedCache(model, scheme, kv_safety="off")
    for piece in stream_text(model, tokenizer, tokens, max_tokens=max_tokens, sampling=sampling, cache=cache):
        pieces.append(piece)
        if on_text is not None:
            on_text(piece)
    return "".join(pieces)


def _resolve(
    model_or_path: PreTrainedModel | str | Path, tokenizer: Tokenizer | None
) -> tuple[PreTrainedModel, Tokenizer]:
    """A model and the tokenizer given for it, or its own."""
    if isinstance(model_or_path, str | Path):
        model, own_tokenizer = load_with_tokenizer(model_or_path)
        return model, tokenizer or own_tokenizer
    tokenizer = tokenizer or _own_tokenizer(model_or_path)
    check_vocabulary(model_or_path, tokenizer)
    return model_or_path, tokenizer


def generate_tokens(
    model: PreTrainedModel, tokens: list[int], *, limit: int, sampling: Sampling, cache: object = None
) -> Iterator[int]:
    """At most ``limit`` tokens that continue ``tokens``, one at a time; the token that ends a text is the last.

    ``cache`` is filled instead of a new one; if it has tokens, they are the first of ``tokens``, but not all of them.
    """
    generator = torch.Generator().manual_seed(sampling.seed)
    last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    ends = end_tokens(model)
    known = getattr(cache, "get_seq_length", int)()
    recent = tokens[known:]
    for _ in range(limit):
        inputs = torch.tensor([recent], device=model.device)
        output = _run(model, input_ids=inputs, past_key_values=cache, use_cache=True, return_dict=True, **last_only)
        token = sampling.choose(output.logits[0, -1], generator)
        yield token
        if token in ends:
            return
        cache = getattr(output, "past_key_values", None)
        recent = [token] if cache is not None else [*recent, token]


def _run(model: PreTrainedModel, **inputs: Any) -> Any:
    """What the model gives. A configuration can contradict itself in ways that only a run brings to light."""
    try:
        with torch.no_grad():
            return model(**inputs)
    except BitwrightError:
        raise
    except Exception as error:
        if isinstance(error, MemoryError) or "allocate" in str(error):
            what, advice = "there is not enough memory to run the model", "a shorter prompt, or fewer tokens"
            raise BitwrightError("BW503", what, why=str(error).partition("\n")[0], suggestion=advice) from error
        what = f"the model cannot be run: {type(error).__name__}: {error}"
        raise BitwrightError("BW307", what, suggestion="restore the config.json that belongs to the weights") from error


def _own_tokenizer(model: PreTrainedModel) -> Tokenizer:
    if not model.name_or_path:
        raise BitwrightError("BW312", "the model does not come from a directory", suggestion="give tokenizer=...")
    return load_tokenizer(Path(model.name_or_path))


def stream_text(
    model: PreTrainedModel,
    tokenizer: Tokenizer,
    tokens: list[int],
    *,
    max_tokens: int | None,
    sampling: Sampling,
    ends: Collection[int] = (),
    cache: object = None,
) -> Iterator[str]:
    """The text that continues ``tokens``, in pieces that end between characters; see :func:`generate`.

    It ends before the tokens with which the model ends a text, and before those of ``ends``. ``cache`` is filled
    instead of a new one, see :func:`generate_tokens`.

    Raises:
        BitwrightError: BW403 with the first piece if the text does not fit the context, BW601 if the model gives NaN.
    """
    limit = room(len(tokens), max_tokens, context_length(model.config))
    detokenizer = Detokenizer(tokenizer, tokens)
    all_ends = end_tokens(model) | {tokenizer.eos_token_id, *ends}
    for token in generate_tokens(model, tokens, limit=limit, sampling=sampling, cache=cache):
        if token in all_ends:
            break
        piece = detokenizer.add(token)
        if piece:
            yield piece
    rest = detokenizer.finish()
    if rest:
        yield rest


def _check(field: str, value: object, accepts: Callable[[float], bool], accepted: str) -> None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not accepts(float(value)):  # type: ignore[arg-type]
        raise ArgumentError("BW201", f"{field} is {value!r}", suggestion=f"accepted: {accepted}")
