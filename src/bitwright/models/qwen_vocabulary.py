"""The tokenizer of the first Qwen, which comes as code, from the vocabulary that lies beside it: ``qwen.tiktoken``.

Each line of that file is a token, in base64, and its rank. Bytes are brought together pair by pair, always the pair
whose token has the least rank, within pieces of the text that a pattern cuts. So do the models of BPE in the library
``tokenizers`` when every way to make a token of two others is one of their merges, in the order of the ranks.

The control tokens have the numbers after the last rank. They and the pattern are facts about these models (Qwen, arXiv
2309.16609, section 2.2), whose successors have them in a ``tokenizer.json``.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitwright.core.errors import BitwrightError
from bitwright.models.merges import find_merges

__all__ = ["CHATML", "END_OF_TEXT", "END_OF_TURN", "START_OF_TURN", "VOCABULARY", "describe_tokenizer"]

VOCABULARY = "qwen.tiktoken"
END_OF_TEXT, START_OF_TURN, END_OF_TURN = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL = (END_OF_TEXT, START_OF_TURN, END_OF_TURN, *(f"<|extra_{number}|>" for number in range(205)))
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# How its models for conversations were taught, with the message before the first turn that they had.
CHATML = (
    "{% if messages[0].role != 'system' %}" + START_OF_TURN + "system\nYou are a helpful assistant." + END_OF_TURN
    + "{{ '\\n' }}{% endif %}{% for message in messages %}" + START_OF_TURN + "{{ message.role }}{{ '\\n' }}"
    + "{{ message.content }}" + END_OF_TURN + "{{ '\\n' }}{% endfor %}"
    + "{% if add_generation_prompt %}" + START_OF_TURN + "assistant{{ '\\n' }}{% endif %}"
)  # fmt: skip
FILE_LIMIT = 64 << 20
MOST_TOKENS = 1 << 20
MOST_BYTES = 1024  # of a token


def describe_tokenizer(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What a ``tokenizer.json`` would say, from a file of ranks, whatever the settings beside it.

    Raises:
        BitwrightError: BW312 if the file cannot be read.
    """
    ranks = _read_ranks(path)
    letters = _letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    try:
        merges = find_merges(ranks, ranks)
    except ValueError as error:
        raise _unreadable(path, str(error)) from error
    first = len(ranks)
    control = [
        {"id": first + number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for number, token in enumerate(CONTROL)
    ]  # fmt: skip
    in_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated", "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": control,
        "normalizer": {"type": "NFC"}, "decoder": in_bytes, "post_processor": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, in_bytes]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": {spelled[token]: rank for token, rank in ranks.items()},
            "merges": [[spelled[left], spelled[right]] for left, right in merges],
        },
    }  # fmt: skip


def _read_ranks(path: Path) -> dict[bytes, int]:
    try:
        if path.stat().st_size > FILE_LIMIT:
            raise _unreadable(path, f"it is larger than {FILE_LIMIT >> 20} MiB")
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from error
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            decoded, position = base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise _unreadable(path, f"line {number} is not a token in base64 and its rank") from error
        if not 0 < len(decoded) <= MOST_BYTES or decoded in ranks or position != len(ranks):
            raise _unreadable(path, f"line {number} is a token without letters, a second time, or out of order")
        if len(ranks) >= MOST_TOKENS:
            raise _unreadable(path, f"it has more than {MOST_TOKENS} tokens")
        ranks[decoded] = position
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise _unreadable(path, f"{len(missing)} bytes have no token, {missing[0]} the first")
    return ranks


def _letters() -> list[str]:
    """The letter that stands for each byte: its own if that can be seen, else one behind the first 256."""
    seen = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in seen]
    return [chr(byte) if byte in seen else chr(256 + others.index(byte)) for byte in range(256)]


def _unreadable(path: Path, why: str) -> BitwrightError:
    what = f"{path.name} is not a vocabulary of Qwen: {why}"
    suggestion = "fetch this file again, or put a tokenizer.json beside it"
    return BitwrightError("BW312", what, where=str(path), suggestion=suggestion)
