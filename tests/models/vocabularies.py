"""Vocabularies as the code of models reads them, small ones."""

from __future__ import annotations

import base64
import json
import random
from pathlib import Path
from typing import Any

__all__ = ["TEXTS", "learned_ranks", "write_qwen"]

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
