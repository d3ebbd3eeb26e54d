"""The small language model inside the package, its texts and its probes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from bitwright.core.errors import BitwrightError

__all__ = ["TEXTS", "Probe", "embedded_directory", "read_probes", "read_text"]

TEXTS = ("heldout", "calibration")


@dataclass(frozen=True, slots=True)
class Probe:
    """A question whose right continuation is known: ``kind`` is qa, recall, copy or sum."""

    kind: str
    prompt: str
    answer: str


def embedded_directory() -> Path:
    """The model's directory: config, weights, tokenizer, texts and probes."""
    return Path(__file__).parent / "embedded"


def read_text(name: str) -> str:
    """One of ``TEXTS``: documents, each closed by the tokenizer's end-of-text token.

    Raises:
        BitwrightError: BW402 for another name.
    """
    if name not in TEXTS:
        raise BitwrightError("BW402", f"there is no embedded text {name!r}", suggestion=f"one of {', '.join(TEXTS)}")
    return (embedded_directory() / f"{name}.txt").read_text(encoding="utf-8")


def read_probes() -> tuple[Probe, ...]:
    """The questions, in the order of the file."""
    lines = (embedded_directory() / "probes.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(Probe(**json.loads(line)) for line in lines)
