"""How one request is to be answered, as DashInfer's dictionaries say it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.compat.dashinfer.allspark.names import AsStatus, Refusal
from bitwright.core.errors import ArgumentError, Notice
from bitwright.engine.options import RequestOptions, is_finite, show
from bitwright.models.hf import Tokenizer

__all__ = ["GenerationConfigBuilder", "read_generation"]


@dataclass(frozen=True, slots=True)
class _Field:
    accepts: Callable[[Any], bool]
    accepted: str


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)


def _number(accepts: Callable[[float], bool], accepted: str) -> _Field:
    return _Field(lambda value: _is_number(value) and accepts(value), accepted)


def _whole(least: int) -> _Field:
    return _Field(lambda value: type(value) is int and value >= least, f"a whole number, at least {least}")


def _only(neutral: object, *others: object) -> _Field:
    return _Field(lambda value: value in (neutral, *others), f"{neutral}: nothing else is supported")


SWITCH = _Field(lambda value: type(value) is bool, "True or False")
FIELDS: dict[str, _Field] = {
    "do_sample": SWITCH,
    "early_stopping": SWITCH,
    "logprobs": SWITCH,
    "max_length": _whole(1),
    "top_k": _whole(0),
    "top_logprobs": _whole(0),
    "seed": _whole(0),
    "eos_token_id": _Field(lambda value: _is_ids(value if isinstance(value, list) else [value]), "a token, or several"),
    "stop_words_ids": _Field(
        lambda value: isinstance(value, list) and all(_is_ids(each) for each in value), "lists of tokens"
    ),
    "temperature": _number(lambda x: x >= 0, "a finite number, 0 or more"),
    "top_p": _number(lambda x: 0 <= x <= 1, "from 0 (all tokens) to 1"),
    "repetition_penalty": _number(lambda x: 0 < x <= 2, "above 0 and at most 2"),
    "presence_penalty": _number(lambda x: -2 <= x <= 2, "from -2 to 2"),
    "frequency_penalty": _number(lambda x: -2 <= x <= 2, "from -2 to 2"),
    "bos_token_id": _Field(lambda value: True, "anything: prompts are tokenized already"),
    "pad_token_id": _Field(lambda value: True, "anything: nothing is padded"),
    "uuid": _Field(lambda value: isinstance(value, str), "a text"),
    "num_beams": _only(1),
    "min_length": _only(0),
    "no_repeat_ngram_size": _only(0),
    "length_penalty": _only(1.0),
    "suppress_repetition_in_generation": _only(False),
    "response_format": _Field(lambda value: isinstance(value, Mapping), "a dictionary"),
}


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(each) is int and 0 <= each < 1 << 31 for each in value)


class GenerationConfigBuilder:
    """The fields of a request, to be changed by ``update``; a plain dictionary of them does as well."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = dict(fields)

    def update(self, fields: Mapping[str, Any]) -> GenerationConfigBuilder:
        """Change fields; they are checked when a request is made.

        Raises:
            ArgumentError: BW201 if this is no dictionary.
        """
        if not isinstance(fields, Mapping):
            what = f"the generation config is updated with a {type(fields).__name__}"
            raise ArgumentError("BW201", what, suggestion='a dictionary, as {"top_k": 1}')
        self._fields.update(fields)
        return self

    def build(self) -> dict[str, Any]:
        """The fields as they are now."""
        return dict(self._fields)


def read_generation(
    config: GenerationConfigBuilder | Mapping[str, Any], prompt: int, limit: int, tokenizer: Tokenizer
) -> RequestOptions:
    """The options of a request with a prompt of so many tokens, to an engine with room for ``limit``.

    Raises:
        Refusal: PARAM_ERROR, naming the field and what is accepted; EXCEED_LIMIT_ERROR for lengths.
    """
    fields = config.build() if isinstance(config, GenerationConfigBuilder) else config
    if not isinstance(fields, Mapping):
        raise Refusal(AsStatus.ALLSPARK_PARAM_ERROR, f"the generation config is a {type(fields).__name__}")
    for name, value in fields.items():
        field = FIELDS.get(name)
        if field is None:
            raise Refusal(AsStatus.ALLSPARK_PARAM_ERROR, f"there is no field {name!r}; known: {', '.join(FIELDS)}")
        if not field.accepts(value):
            raise Refusal(AsStatus.ALLSPARK_PARAM_ERROR, f"{name} is {show(value)}; accepted: {field.accepted}")
    if "response_format" in fields:
        warnings.warn("response_format is not supported: the answer is plain text", Notice, stacklevel=4)
    return RequestOptions(max_tokens=_room(fields.get("max_length", limit), prompt, limit), **_rest(fields, tokenizer))


def _room(max_length: int, prompt: int, limit: int) -> int:
    """DashInfer's rule: prompt and answer together have at most ``max_length`` tokens, the answer at least two."""
    if max_length > limit:
        what = f"max_length is {max_length}; the engine was started with {limit}"
    elif prompt == 0:
        what = "the prompt is empty"
    elif prompt >= max_length - 1:
        what = f"the prompt has {prompt} tokens; max_length is {max_length}"
    else:
        return max_length - prompt
    raise Refusal(AsStatus.ALLSPARK_EXCEED_LIMIT_ERROR, what)


def _rest(fields: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, Any]:
    """Their names to ours."""
    same = ("top_k", "repetition_penalty", "presence_penalty", "frequency_penalty", "seed")
    options = {name: fields[name] for name in same if name in fields}
    options["temperature"] = fields.get("temperature", 1.0) if fields.get("do_sample", True) else 0.0
    options["top_p"] = fields.get("top_p", 1.0) or 1.0
    if fields.get("logprobs"):
        options["logprobs"] = fields.get("top_logprobs", 0)
    ends = fields.get("eos_token_id", [])
    stop_ids = list(ends) if isinstance(ends, list) else [ends]
    words = fields.get("stop_words_ids", [])
    options["stop_ids"] = tuple(stop_ids + [word[0] for word in words if len(word) == 1])
    options["stop"] = tuple(str(tokenizer.decode(word)) for word in words if len(word) > 1)
    # Tokens given as the end stand for the model's own.
    options["ignore_end"] = bool(stop_ids) or not fields.get("early_stopping", True)
    return options
