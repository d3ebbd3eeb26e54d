"""Tokenizers that come with a model as code: described by the vocabularies beside that code, which is never run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from bitwright.core.errors import BitwrightError
from bitwright.formats.directory import find_file, read_object
from bitwright.formats.fused import find_family
from bitwright.models import qwen_vocabulary, sentencepiece_vocabulary

__all__ = ["Description", "describe_coded", "has_vocabulary"]

Reader: TypeAlias = Callable[[Path, Mapping[str, Any]], dict[str, Any]]
READERS: dict[str, tuple[str, Reader]] = {  # of each family its vocabulary, and what describes it
    "qwen": (qwen_vocabulary.VOCABULARY, qwen_vocabulary.describe_tokenizer),
    "internlm2": (sentencepiece_vocabulary.VOCABULARY, sentencepiece_vocabulary.describe_tokenizer),
}
CLASSES = {"QWenTokenizer": "qwen", "InternLM2Tokenizer": "internlm2", "InternLM2TokenizerFast": "internlm2"}
WHOLE, TEMPLATE = "tokenizer.json", "chat_template.jinja"
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
LIMIT = 64 << 20


@dataclass(frozen=True, slots=True)
class Description:
    """A tokenizer: what the library ``tokenizers`` reads (``text``), and what that does not know (``settings``)."""

    text: str
    settings: Mapping[str, Any]


def has_vocabulary(directory: Path) -> bool:
    """Whether the directory of a model holds a whole tokenizer, or what is read in the place of its code.

    Raises:
        BitwrightError: BW310 if that is a link out of the directory, BW312 if what says which it is cannot be read.
    """
    if find_file(directory, WHOLE) is not None:
        return True
    family = _find_class(directory, _read(directory, "tokenizer_config.json"))
    return family is not None and find_file(directory, READERS[family][0]) is not None


def describe_coded(directory: Path) -> Description | None:
    """The tokenizer of a model that brings code for it, by the name of its class or else the model's family; ``None``
    for other tokenizers.

    A ``tokenizer.json`` that somebody has put beside the code counts before the vocabulary that the code reads.

    Raises:
        BitwrightError: BW310 if a file is a link out of the directory, BW312 if one cannot be read, or there is none.
    """
    settings = _read(directory, "tokenizer_config.json")
    family = _find_class(directory, settings)
    if family is None:
        return None
    whole = find_file(directory, WHOLE)
    if whole is not None:
        described = read_object(whole, code="BW312", limit=LIMIT)
    else:
        name, describe = READERS[family]
        path = find_file(directory, name)
        if path is None:
            raise _code_alone(directory, name)
        described = describe(path, settings)
    named = {name: token for name in NAMED if (token := _token(settings.get(name))) is not None}
    template = _template(directory, settings)
    if template is not None:
        named["chat_template"] = template
    named = {**_defaults(directory, family, described), **named}
    return Description(json.dumps(described), named)


def _find_class(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """Whose code the tokenizer is, if it is one of those that are known."""
    named = settings.get("tokenizer_class")
    return CLASSES.get(named) if isinstance(named, str) else find_family(_read(directory, "config.json"))


def _template(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The chat template: in a file of its own, or among the settings."""
    path = find_file(directory, TEMPLATE)
    if path is None:
        found = settings.get("chat_template")
        return found if isinstance(found, str) else None
    try:
        if path.stat().st_size > LIMIT:
            raise ValueError(f"it is larger than {LIMIT >> 20} MiB")
        return path.read_bytes().decode()
    except (OSError, ValueError) as error:
        what, suggestion = f"{TEMPLATE} cannot be read: {error}", "fetch this file again"
        raise BitwrightError("BW312", what, where=str(path), suggestion=suggestion) from error


def _code_alone(directory: Path, name: str) -> BitwrightError:
    what = "the tokenizer of this model is code, which is never run, and its vocabulary is not there"
    suggestion = f"put {WHOLE} or {name} there, or give tokens: Engine(bitwright.load(DIRECTORY))"
    return BitwrightError("BW312", what, where=str(directory), suggestion=suggestion)


def _read(directory: Path, name: str) -> dict[str, Any]:
    path = find_file(directory, name)
    return {} if path is None else read_object(path, code="BW312", limit=LIMIT)


def _token(value: object) -> str | None:
    """A special token as settings have it: a text, or an object with its content."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) and found else None


def _defaults(directory: Path, family: str, described: Mapping[str, Any]) -> dict[str, Any]:
    """What the code says of its tokens and, of a Qwen that was taught conversations, of those."""
    tokens = described.get("added_tokens")
    listed = tokens if isinstance(tokens, list) else []
    known = {token.get("content") for token in listed if isinstance(token, dict)}
    talks = family == "qwen" and _read(directory, "generation_config.json").get("chat_format") == "chatml"
    end = qwen_vocabulary.END_OF_TURN if talks else qwen_vocabulary.END_OF_TEXT
    qwen = {"eos_token": end, "pad_token": qwen_vocabulary.END_OF_TEXT}
    named = qwen if family == "qwen" else sentencepiece_vocabulary.NAMED
    found = {name: token for name, token in named.items() if token in known}
    return found | ({"chat_template": qwen_vocabulary.CHATML} if talks and end in known else {})
