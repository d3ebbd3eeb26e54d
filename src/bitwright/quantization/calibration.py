"""Calibration text to token windows: where texts come from and how they are cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.models.embedded_model import read_text
from bitwright.models.hf import Tokenizer

__all__ = [
    "DEFAULT_SEQLEN",
    "FEW_SAMPLES",
    "CalibrationTokens",
    "cut_windows",
    "read_calibration_text",
    "tokenize",
    "window_length",
]

DEFAULT_SEQLEN = 2048
FEW_SAMPLES = 32  # below this many, statistics of wide layers rest on too few tokens
EMBEDDED_TEXTS = ("calibration", "heldout")  # ship with the embedded model


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationTokens:
    """``windows``: int64 ``[samples, seqlen]``; ``available``: how many windows the text would have given."""

    windows: Tensor
    available: int
    source: str

    def fingerprint(self) -> str:
        """The sha256 of the tokens and of how they are cut."""
        digest = hashlib.sha256(repr(tuple(self.windows.shape)).encode())
        digest.update(self.windows.contiguous().numpy().tobytes())
        return digest.hexdigest()


def read_calibration_text(name: str | Path) -> str:
    """The text of a file, or of a data set that ships with bitwright (``calibration``, ``heldout``).

    Raises:
        BitwrightError: BW402 for a name that is neither, BW401 for an empty or undecodable file.
    """
    path = Path(name)
    if _is_file(path):
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError) as error:
            what, suggestion = f"{path} cannot be read as UTF-8 text: {error}", "save it as UTF-8, or give another file"
            raise BitwrightError("BW401", what, suggestion=suggestion) from None
        if not text.strip():
            raise BitwrightError(
                "BW401", f"{path} holds no text", suggestion="give a file with text in the model's language"
            )
        return text
    if str(name) in EMBEDDED_TEXTS:
        return read_text(str(name))
    raise BitwrightError(
        "BW402",
        f"{str(name)!r} is neither a file nor a data set that ships with bitwright",
        suggestion=f"a path to a UTF-8 text file, or one of {', '.join(EMBEDDED_TEXTS)}",
    )


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name too long, or behind a directory that may not be read
        return False


def tokenize(tokenizer: Tokenizer, text: str, *, add_special_tokens: bool = False) -> Tensor:
    """Token ids (int64) of a whole text; nothing is added, unless asked for, and nothing cut off.

    Special tokens that the text spells out count as such: that is how texts of many documents are divided.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        # One call of the underlying tokenizer: the wrapper would warn about texts longer than the context. What
        # tokenizer.json says of cutting and filling up (it is saved with the last call's settings) is not for texts.
        backend.no_truncation()
        backend.no_padding()
        return torch.tensor(backend.encode(text, add_special_tokens=add_special_tokens).ids, dtype=torch.int64)
    return torch.tensor(tokenizer.encode(text, add_special_tokens=add_special_tokens), dtype=torch.int64)


def window_length(seqlen: int | None, context: int | None, *, option: str = "--seqlen") -> int:
    """How many tokens a window has: as asked, else ``DEFAULT_SEQLEN``, or the model's ``context`` if that is shorter.

    Raises:
        ArgumentError: BW201 if ``seqlen`` is beyond the context; ``option`` is its name there.
    """
    if seqlen is not None and context is not None and seqlen > context:
        what = f"{option} {seqlen} is longer than the context of the model, {context} tokens"
        raise ArgumentError("BW201", what, suggestion=f"{option} {context}")
    return seqlen or min(DEFAULT_SEQLEN, context or DEFAULT_SEQLEN)


def cut_windows(ids: Tensor, *, samples: int, seqlen: int, seed: int, source: str) -> CalibrationTokens:
    """Cut ``ids`` into consecutive windows and draw ``samples`` of them, in text order, without repetition.

    Raises:
        BitwrightError: BW201 for impossible numbers, BW401 if not even one window is full.
    """
    if samples < 1 or seqlen < 2:
        field, value = ("samples", samples) if samples < 1 else ("seqlen", seqlen)
        raise BitwrightError("BW201", f"{field} is {value}", suggestion="at least 1 sample of at least 2 tokens")
    available = len(ids) // seqlen
    if available == 0:
        raise BitwrightError(
            "BW401",
            f"{source} has {len(ids)} tokens, which is less than one sample of {seqlen}",
            why=f"samples asked: {samples}; full samples found: 0",
            suggestion=f"--seqlen {len(ids)} or less, or a longer text" if len(ids) >= 2 else "a longer text",
        )
    generator = torch.Generator().manual_seed(seed)
    chosen: Sequence[int] = torch.randperm(available, generator=generator)[:samples].sort().values.tolist()
    windows = ids[: available * seqlen].view(available, seqlen)[chosen]
    return CalibrationTokens(windows=windows.clone(), available=available, source=source)
