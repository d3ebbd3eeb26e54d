"""The training text as one array of token ids, made once and kept in the work directory."""

from __future__ import annotations

import os
from itertools import count as count_from
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from . import vocabulary
from .text import END_OF_TEXT, document, documents

SAMPLE_DOCUMENTS = 20_000
BLOCK_DOCUMENTS = 4_000


def load_tokenizer(work_dir: Path) -> Tokenizer:
    """Return the tokenizer of the work directory, training it first if there is none."""
    path = work_dir / "tokenizer.json"
    if not path.exists():
        partial = path.with_suffix(".partial")
        vocabulary.train(documents("vocabulary", SAMPLE_DOCUMENTS)).save(str(partial))
        os.replace(partial, path)
    return Tokenizer.from_file(str(path))


def end_of_text(tokenizer: Tokenizer) -> int:
    """Return the id of the token that closes a document."""
    return int(tokenizer.encode(END_OF_TEXT).ids[0])


def encode(tokenizer: Tokenizer, texts: list[str]) -> list[int]:
    """Return the ids of documents one after the other, each closed by the end-of-text token."""
    end = end_of_text(tokenizer)
    rows = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [token for row in rows for token in (*row.ids, end)]


def load_tokens(work_dir: Path, tokenizer: Tokenizer, count: int) -> NDArray[np.uint16]:
    """Return the first `count` tokens of the training text (uint16), from disk if they are there."""
    path = work_dir / f"train-{count}.npy"
    if not path.exists():
        tokens = np.empty(count, dtype=np.uint16)
        filled = 0
        for first in count_from(0, BLOCK_DOCUMENTS):
            block = range(first, first + BLOCK_DOCUMENTS)
            ids = encode(tokenizer, [document("train", index) for index in block])
            taken = min(len(ids), count - filled)
            tokens[filled : filled + taken] = ids[:taken]
            filled += taken
            if filled == count:
                break
        partial = work_dir / f"train-{count}.partial.npy"
        np.save(partial, tokens)
        os.replace(partial, path)
    loaded: NDArray[np.uint16] = np.load(path, mmap_mode="r")
    return loaded
