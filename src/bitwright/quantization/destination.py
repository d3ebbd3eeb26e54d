"""The output directory: when it may be written to, and how an old checkpoint in it is removed."""

from __future__ import annotations

from pathlib import Path

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import INDEX, WORK_DIRECTORY
from bitwright.formats.storage import remove_tree
from bitwright.quantization.report import REPORT_FILE

__all__ = ["check_output", "clear_output"]


def check_output(output: Path, source: Path | None, *, overwrite: bool) -> None:
    """Refuse to write over anything that was not asked to be replaced, and never over the source.

    Raises:
        BitwrightError: BW203.
    """
    if output.exists() and not output.is_dir():
        raise BitwrightError("BW203", f"{output} is a file", suggestion="give a directory that is new or empty")
    if source is not None and output.resolve() == source.resolve():
        raise BitwrightError(
            "BW203", f"{output} is the source model itself", suggestion="choose another output directory"
        )
    if not output.is_dir() or not any(output.iterdir()):
        return
    if (output / WORK_DIRECTORY).is_dir():
        return  # unfinished: the journal decides whether it can be resumed
    if not ((output / INDEX).exists() and (output / REPORT_FILE).exists()):
        raise BitwrightError(
            "BW203",
            f"{output} holds files that are not a checkpoint of bitwright",
            suggestion="choose another directory",
        )
    if not overwrite:
        raise BitwrightError(
            "BW203",
            f"{output} holds a finished checkpoint",
            suggestion="choose another directory, or replace it with --overwrite",
        )


def clear_output(output: Path) -> None:
    """Remove an old checkpoint: the index first, so that what is left never looks whole."""
    remove_tree(output / INDEX)
    for entry in sorted(output.iterdir()):
        if entry.name != WORK_DIRECTORY:
            remove_tree(entry)
    for entry in sorted((output / WORK_DIRECTORY).iterdir()):
        if entry.name != "lock":
            remove_tree(entry)
