"""Vocabularies as the code of models reads them, small ones."""

from __future__ import annotations

import base64
import json
import random
import struct
from pathlib import Path
from typing import Any

__all__ = ["TEXTS", "learned_pieces", "learned_ranks", "write_internlm2", "write_qwen"]

TEXTS = (
    "The cat sat on the mat.", "the  thing\n\n  that's all", "naïve café, ﬁne", "数字 123 und 4567!", "x" * 40,
    "tabs\tand\r\nlines", " ", "I'LL don't WE'VE", "🙂🙂 ok", "a\u0301b",
)  # fmt: skip
CODE = {"tokenizer_class": "QWenTokenizer", "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}}


def learned_ranks(count: int, seed: int) -> list[bytes]:
    """All bytes, then tokens that are each two earlier ones: of the texts above, and some of any."""
    generator = random.Random(seed)
    tokens = [bytes([byte]) for byte in generator.sample(range(256), 256)]
    corpus = "".join(TEXTS).encode() * 3
    while len(tokens) < count:
        left = generator.choice(tokens)
        place = corpus.find(left, generator.randrange(len(corpus)))
        followers = [token for token in tokens if place >= 0 and corpus[place + len(left) :].startswith(token)]
        made = left + generator.choice(followers or tokens)
        if len(made) <= 12 and made not in tokens:
            tokens.append(made)
    return tokens


def write_qwen(directory: Path, ranks: list[bytes], **generation: Any) -> Path:
    directory.mkdir(exist_ok=True)
    lines = [base64.b64encode(token).decode() + f" {rank}" for rank, token in enumerate(ranks)]
    (directory / "qwen.tiktoken").write_text("\n".join(lines) + "\n")
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen"}))
    (directory / "tokenizer_config.json").write_text(json.dumps(CODE))
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def learned_pieces(count: int, seed: int) -> list[tuple[str, float, int]]:
    """Text, score and kind: controls, bytes, pieces that are each two others, and letters of the texts."""
    generator = random.Random(seed)
    corpus = "\u2581".join(TEXTS).replace(" ", "\u2581")
    letters = sorted(set(corpus) - set("数字🙂"))  # these become bytes
    pieces = list[str]()
    while len(pieces) < count:
        place = generator.randrange(len(corpus))
        known = [piece for piece in letters + pieces if corpus.startswith(piece, place)]
        left = generator.choice(known) if known else "a"
        followers = [piece for piece in letters + pieces if corpus.startswith(piece, place + len(left))]
        made = left + generator.choice(followers or ["a"])
        if len(made) <= 10 and made not in pieces:
            pieces.append(made)
    scored = [(piece, -float(rank), 1) for rank, piece in enumerate([*pieces, *letters])]
    return [
        ("<unk>", 0.0, 2),
        ("<s>", 0.0, 3),
        ("</s>", 0.0, 3),
        *((f"<0x{b:02X}>", 0.0, 6) for b in range(256)),
        *scored,
    ]


def varint(value: int) -> bytes:
    groups = [value >> shift & 127 for shift in range(0, max(value.bit_length(), 1), 7)]
    return bytes([*(group | 128 for group in groups[:-1]), groups[-1]])


def message(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def write_internlm2(
    directory: Path,
    pieces: list[tuple[str, float, int]],
    *,
    kind: int = 2,
    prefix: bool = True,
    prepared: bytes = b"\x20\x00",
    **settings: Any,
) -> Path:
    """``prepared``: what else the file says of how a text is prepared: that spaces at its ends are kept."""
    directory.mkdir(exist_ok=True)
    data = b""
    for text, score, sort in pieces:
        fields = message(1, text.encode()) + varint(2 << 3 | 5) + struct.pack("<f", score)
        data += message(1, fields + (varint(3 << 3) + varint(sort) if sort != 1 else b""))
    data += message(2, varint(3 << 3) + varint(kind) + varint(35 << 3) + b"\x01" + message(1, b"corpus.txt"))
    data += message(3, message(1, b"identity") + varint(3 << 3) + varint(int(prefix)) + prepared)
    (directory / "tokenizer.model").write_bytes(data)
    (directory / "config.json").write_text(json.dumps({"model_type": "internlm2"}))
    code = {"auto_map": {"AutoTokenizer": ["tokenization_internlm2.InternLM2Tokenizer", None]}}
    named = {"tokenizer_class": "InternLM2Tokenizer", "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    (directory / "tokenizer_config.json").write_text(json.dumps({**code, **named, **settings}))
    return directory
