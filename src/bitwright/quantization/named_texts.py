"""The data sets that documents calibrate on, by name: from a local copy, or through the ``datasets`` library."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from bitwright.core.errors import BitwrightError
from bitwright.core.settings import read_settings

__all__ = ["NAMED_TEXTS", "NamedText", "read_named_text"]

DOCUMENTS = 4096  # read of a data set that has many: far more than calibration asks for


@dataclass(frozen=True, slots=True)
class NamedText:
    """Where a data set is on the hub, and the field of its records that holds text."""

    repository: str
    subset: str
    split: str
    field: str


NAMED_TEXTS = {
    "ptb": NamedText("ptb-text-only/ptb_text_only", "penn_treebank", "train", "sentence"),
    "wikitext2": NamedText("Salesforce/wikitext", "wikitext-2-raw-v1", "train", "text"),
    "c4": NamedText("allenai/c4", "en", "train", "text"),
}


def read_named_text(name: str | Path) -> str | None:
    """The text of a data set in ``NAMED_TEXTS``; ``None`` for any other name, and for a file that is called so.

    A local copy is ``datasets/NAME.txt`` in bitwright's cache directory.

    Raises:
        BitwrightError: BW402 if there is neither a copy nor the library, or the data set cannot be fetched.
    """
    named = NAMED_TEXTS.get(str(name))
    if named is None or Path(name).is_file():
        return None
    copy = read_settings().cache / "datasets" / f"{name}.txt"
    if copy.is_file():
        return copy.read_text(encoding="utf-8")
    try:
        library = importlib.import_module("datasets")
    except ImportError:
        raise _missing(str(name), copy, "the 'datasets' library is not installed") from None
    try:
        records = library.load_dataset(named.repository, named.subset, split=named.split, streaming=True)
        return "\n".join(str(record[named.field]) for record in islice(records, DOCUMENTS))
    except Exception as error:  # whatever a network, a proxy or a changed repository raises
        why = f"{named.repository} cannot be fetched: {type(error).__name__}"
        raise _missing(str(name), copy, why) from error


def _missing(name: str, copy: Path, why: str) -> BitwrightError:
    choices = (
        f"a text file (--calib-dataset ./my.txt), its text as {copy}, or 'calibration', which ships with bitwright"
    )
    others = ", ".join(other for other in NAMED_TEXTS if other != name)
    return BitwrightError(
        "BW402",
        f"the data set {name!r} is not here",
        why=why,
        suggestion=f"{choices}; {others} need a network or a copy, too",
    )
