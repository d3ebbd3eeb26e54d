"""Tokenizers that come with a model as code: described by the vocabularies beside that code, which is never run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.core.errors import BitwrightError
from bitwright.formats.directory import find_file, read_object
from bitwright.formats.fused import find_family
from bitwright.models import qwen_vocabulary

__all__ = ["VOCABULARIES", "Description", "describe_coded", "has_vocabulary"]

READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    qwen_vocabulary.VOCABULARY: qwen_vocabulary.describe_tokenizer,
}
VOCABULARIES = tuple(READERS)
CLASSES = {"QWenTokenizer": "qwen", "InternLM2Tokenizer": "internlm2", "InternLM2TokenizerFast": "internlm2"}
WHOLE = "tokenizer.json"
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
        BitwrightError: BW310 if that is a link out of the directory.
    """
    return any(find_file(directory, name) is not None for name in (WHOLE, *VOCABULARIES))


def describe_coded(directory: Path) -> Description | None:
    """The tokenizer of a model that brings code for it, by the name of its class or else the model's family; ``None``
    for other tokenizers.

    A ``tokenizer.json`` that somebody has put beside the code counts before the vocabulary that the code reads.

    Raises:
        BitwrightError: BW310 if a file is a link out of the directory, BW312 if one cannot be read, or there is none.
    """
    settings = _read(directory, "tokenizer_config.json")
    named_class = settings.get("tokenizer_class")
    family = CLASSES.get(named_class) if isinstance(named_class, str) else find_family(_read(directory, "config.json"))
    if family is None:
        return None
    whole = find_file(directory, WHOLE)
    if whole is not None:
        described = read_object(whole, code="BW312", limit=LIMIT)
    else:
        name = next((name for name in READERS if find_file(directory, name) is not None), None)
        if name is None:
            raise _code_alone(directory)
        described = READERS[name](directory / name)
    named = {name: token for name in NAMED if (token := _token(settings.get(name))) is not None}
    if isinstance(settings.get("chat_template"), str):
        named["chat_template"] = settings["chat_template"]
    if family == "qwen":
        named = _qwen_settings(directory, described) | named
    return Description(json.dumps(described), named)


def _code_alone(directory: Path) -> BitwrightError:
    what = "the tokenizer of this model is code, which is never run, and its vocabulary is not there"
    suggestion = f"put {' or '.join((WHOLE, *READERS))} there, or give tokens: Engine(bitwright.load(DIRECTORY))"
    return BitwrightError("BW312", what, where=str(directory), suggestion=suggestion)


def _read(directory: Path, name: str) -> dict[str, Any]:
    path = find_file(directory, name)
    return {} if path is None else read_object(path, code="BW312", limit=LIMIT)


def _token(value: object) -> str | None:
    """A special token as settings have it: a text, or an object with its content."""
    found = value.get("content") if isinstance(value, dict) else value
    return found if isinstance(found, str) and found else None


def _qwen_settings(directory: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """What the code of Qwen says of its tokens, and of conversations where the model was taught those."""
    tokens = described.get("added_tokens")
    known = (
        {str(token.get("content")) for token in tokens if isinstance(token, dict)} if isinstance(tokens, list) else ()
    )
    talks = _read(directory, "generation_config.json").get("chat_format") == "chatml"
    end = qwen_vocabulary.END_OF_TURN if talks else qwen_vocabulary.END_OF_TEXT
    named = {"eos_token": end, "pad_token": qwen_vocabulary.END_OF_TEXT}
    named = {name: token for name, token in named.items() if token in known}
    return named | ({"chat_template": qwen_vocabulary.CHATML} if talks and end in known else {})
