"""The output directory: when it may be written to, and how what an earlier run left in it is removed."""

from __future__ import annotations

from pathlib import Path

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import CONFIG, INDEX, SHARD, WORK_DIRECTORY
from bitwright.formats.checksums import CHECKSUMS
from bitwright.formats.storage import remove_file, remove_tree
from bitwright.quantization.card import CARD_FILE
from bitwright.quantization.journal import JOURNAL_FILE
from bitwright.quantization.report import REPORT_FILE
from bitwright.quantization.writer import COMPANIONS

__all__ = ["check_output", "clear_output", "clear_work"]

OWN_FILES = {CONFIG, CHECKSUMS, REPORT_FILE, CARD_FILE, *COMPANIONS}


def check_output(output: Path, source: Path | None, *, overwrite: bool) -> None:
    """Refuse to write over anything that was not asked to be replaced, and never over the source.

    Raises:
        BitwrightError: BW203.
    """
    try:
        refusal = _refusal(output, source, overwrite=overwrite)
    except (OSError, ValueError) as error:  # a name too long, a directory that may not be read
        refusal = f"{output} cannot be used: {error}", "choose another output directory"
    if refusal is not None:
        raise BitwrightError("BW203", refusal[0], suggestion=refusal[1])


def clear_output(output: Path) -> None:
    """Remove what an earlier run left, and nothing else; the index first, so that what is left never looks whole."""
    remove_file(output / INDEX)
    for entry in sorted(output.iterdir()):
        name = entry.name.removeprefix(".").removesuffix(".tmp")  # or a file that a kill left half written
        if name in OWN_FILES or SHARD.fullmatch(name) or name == INDEX:
            remove_tree(entry)
    for entry in sorted((output / WORK_DIRECTORY).iterdir()):
        if entry.name != "lock":
            remove_tree(entry)


def clear_work(work: Path) -> None:
    """Empty the work directory of a run that has ended, but for its lock.

    The journal goes last: for as long as it is there, the same command ends the run once more.
    """
    for entry in sorted(work.iterdir()):
        if entry.name not in ("lock", JOURNAL_FILE):
            remove_tree(entry)
    remove_file(work / JOURNAL_FILE)


def _refusal(output: Path, source: Path | None, *, overwrite: bool) -> tuple[str, str] | None:
    """What is wrong with the directory, and what to do."""
    if output.exists() and not output.is_dir():
        return f"{output} is a file", "give a directory that is new or empty"
    if source is not None and output.resolve() == source.resolve():
        return f"{output} is the source model itself", "choose another output directory"
    if (output / WORK_DIRECTORY).is_symlink():  # what it leads to would be emptied
        return f"{output / WORK_DIRECTORY} is a link", "remove it, or choose another output directory"
    if not output.is_dir() or not any(output.iterdir()):
        return None
    work, is_indexed = output / WORK_DIRECTORY, (output / INDEX).exists()
    if work.is_dir() and ((work / JOURNAL_FILE).exists() or not is_indexed):
        return None  # unfinished: the journal decides whether it can be resumed
    if not (is_indexed and (output / REPORT_FILE).exists()):
        return f"{output} holds files that are not a checkpoint of bitwright", "choose another directory"
    if overwrite:
        return None
    return f"{output} holds a finished checkpoint", "choose another directory, or replace it with --overwrite"
