"""The tokenizer of InternLM2, which comes as code, from the vocabulary that lies beside it: ``tokenizer.model``.

That file is of SentencePiece (arXiv 1808.06226): a message of protocol buffers with the pieces, their scores and kinds,
and how text is prepared. Of its kinds of models the one is read that InternLM2 has: neighbours are brought together,
always the two whose piece has the highest score, and characters without a piece become their bytes.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.core.errors import BitwrightError
from bitwright.models.merges import find_merges

__all__ = ["NAMED", "VOCABULARY", "describe_tokenizer"]

VOCABULARY = "tokenizer.model"
FILE_LIMIT = 64 << 20
MOST_PIECES = 1 << 20
MOST_LETTERS = 256  # of a piece
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # kinds of pieces
BPE = 2  # kind of a model
SPACE = "\u2581"
NAMED = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}


@dataclass(frozen=True, slots=True)
class _Piece:
    text: str
    score: float
    kind: int


@dataclass(frozen=True, slots=True)
class _Model:
    """``prefix``: whether a space is put before a text; ``trimmed``: whether a text loses the spaces at its ends and of
    several in between all but one."""

    pieces: tuple[_Piece, ...]
    prefix: bool
    trimmed: bool


def describe_tokenizer(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``tokenizer.json`` would say, from such a file and the settings beside it, which rename some pieces.

    Raises:
        BitwrightError: BW312 if the file cannot be read, or is of another kind.
    """
    try:
        if path.stat().st_size > FILE_LIMIT:
            raise ValueError(f"it is larger than {FILE_LIMIT >> 20} MiB")
        return _describe(_read_model(path.read_bytes()), settings)
    except (OSError, ValueError, struct.error) as error:
        what = f"{path.name} is not a vocabulary of InternLM2: {error}"
        suggestion = "fetch this file again, or put a tokenizer.json beside it"
        raise BitwrightError("BW312", what, where=str(path), suggestion=suggestion) from error


def _describe(model: _Model, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same of what is read."""
    pieces = model.pieces
    added = _added(pieces, settings.get("added_tokens_decoder"))
    texts = [added[number]["content"] if number in added else piece.text for number, piece in enumerate(pieces)]
    vocabulary = {text: number for number, text in enumerate(texts)}
    unknown = next((piece.text for piece in pieces if piece.kind == UNKNOWN), None)
    start = vocabulary.get(NAMED["bos_token"]) if settings.get("add_bos_token", True) is True else None
    trim = [_replace(r"\A +| +\z", "", "Regex"), _replace(" {2,}", " ", "Regex")] if model.trimmed else []
    prepend = [{"type": "Prepend", "prepend": SPACE}] if model.prefix else []
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if model.prefix else []
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": list(added.values()),
        "normalizer": {"type": "Sequence", "normalizers": [*trim, *prepend, _replace(" ", SPACE)]},
        "pre_tokenizer": None,
        "post_processor": None if start is None else _template(NAMED["bos_token"], start),
        "decoder": {
            "type": "Sequence", "decoders": [_replace(SPACE, " "), {"type": "ByteFallback"}, {"type": "Fuse"}, *strip],
        },
        "model": {
            "type": "BPE", "dropout": None, "unk_token": unknown, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
            "vocab": vocabulary, "merges": _merges(pieces, vocabulary),
        },
    }  # fmt: skip


def _added(pieces: Sequence[_Piece], renamed: object) -> dict[int, dict[str, Any]]:
    """Pieces that are found as a whole before anything else, by their numbers; controls are special."""
    common = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    found = {
        number: {"id": number, "content": piece.text, "special": piece.kind != USER_DEFINED, **common}
        for number, piece in enumerate(pieces)
        if piece.kind in (UNKNOWN, CONTROL, USER_DEFINED)
    }
    for key, token in renamed.items() if isinstance(renamed, dict) else ():
        text = token.get("content") if isinstance(token, dict) else None
        is_place = key.isdecimal() and len(key) < 10 and int(key) < len(pieces)
        if is_place and isinstance(text, str) and text:
            found[int(key)] = {"id": int(key), "content": text, "special": bool(token.get("special")), **common}
    return dict(sorted(found.items()))


def _merges(pieces: Sequence[_Piece], vocabulary: Mapping[str, int]) -> list[list[str]]:
    """Every two pieces that make a third, the highest score first."""
    ordered = sorted((piece for piece in pieces if piece.kind == NORMAL), key=lambda piece: -piece.score)
    found = find_merges([piece.text for piece in ordered], vocabulary)
    return [[left, right] for left, right in found if left + right in vocabulary]


def _replace(what: str, by: str, kind: str = "String") -> dict[str, Any]:
    return {"type": "Replace", "pattern": {kind: what}, "content": by}


def _template(token: str, number: int) -> dict[str, Any]:
    """A text begins with ``token``."""
    first: dict[str, Any] = {"SpecialToken": {"id": token, "type_id": 0}}
    parts: list[dict[str, Any]] = [{"Sequence": {"id": name, "type_id": kind}} for kind, name in enumerate("AB")]
    known = {token: {"id": token, "ids": [number], "tokens": [token]}}
    single, pair = [first, parts[0]], [first, *parts]
    return {"type": "TemplateProcessing", "single": single, "pair": pair, "special_tokens": known}


def _read_model(data: bytes) -> _Model:
    pieces, trained, prepared = list[_Piece](), dict[int, int | bytes](), dict[int, int | bytes]()
    for field, value in _fields(data):
        if field == 1:
            pieces.append(_read_piece(_message(value)))
        elif field == 2:
            trained = dict(_fields(_message(value)))
        elif field == 3:
            prepared = dict(_fields(_message(value)))
        if len(pieces) > MOST_PIECES:
            raise ValueError(f"it has more than {MOST_PIECES} pieces")
    # Of fields that are not there the definition says what they would be.
    if _number(trained.get(3, 1)) != BPE or not trained.get(35, 0) or _message(prepared.get(2, b"")):
        raise ValueError("its model is not of merges and bytes, or it changes the characters of a text")
    if trained.get(24, 0) or not prepared.get(5, 1):
        raise ValueError("it marks spaces otherwise than at the beginning of a word")
    if len({piece.text for piece in pieces}) != len(pieces) or not pieces:
        raise ValueError("it has no pieces, or one twice")
    return _Model(tuple(pieces), prefix=bool(prepared.get(3, 1)), trimmed=bool(prepared.get(4, 1)))


def _read_piece(data: bytes) -> _Piece:
    fields = dict(_fields(data))
    text, score = _message(fields.get(1, b"")).decode(), struct.unpack("<f", _message(fields.get(2, bytes(4))))[0]
    if not 0 < len(text) <= MOST_LETTERS or score != score:
        raise ValueError("a piece has no letters, too many, or no score")
    return _Piece(text, score, _number(fields.get(3, NORMAL)))


def _message(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise ValueError("a field is a number where a message should be")
    return value


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("a field is a message where a number should be")
    return value


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """The fields of a message: number and value, those of fixed width as their bytes."""
    position = 0
    while position < len(data):
        key, position = _read_varint(data, position)
        width = {1: 8, 5: 4}.get(key & 7, 0)
        if key & 7 == 0:
            value, position = _read_varint(data, position)
            yield key >> 3, value
            continue
        if key & 7 == 2:
            width, position = _read_varint(data, position)
        elif not width:
            raise ValueError(f"a field of an unknown kind at byte {position}")
        if position + width > len(data):
            raise ValueError(f"it ends within a field at byte {position}")
        yield key >> 3, data[position : position + width]
        position += width


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte, position = data[position], position + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
    raise ValueError(f"a number does not end at byte {position}")
