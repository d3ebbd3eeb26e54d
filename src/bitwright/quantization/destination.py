"""The output directory: when it may be written to, where shards go, and how what an earlier run left is removed.

A finished checkpoint that is to be replaced stays as it is while the new shards are written to a directory beside its
files. When all are there, its index is removed, its other files follow, and the new shards are moved into place; where
that is interrupted, the same command ends it.
"""

from __future__ import annotations

import json
from pathlib import Path

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import CONFIG, INDEX, SHARD, WORK_DIRECTORY, WORK_JOURNAL
from bitwright.formats.checksums import CHECKSUMS, listed_files
from bitwright.formats.storage import make_directory, move_file, remove_file, remove_tree
from bitwright.quantization.card import CARD_FILE, CARD_MARK
from bitwright.quantization.journal import recorded_files
from bitwright.quantization.report import REPORT_FILE
from bitwright.quantization.writer import COMPANIONS

__all__ = ["check_output", "clear_output", "clear_work", "put_in_place", "resumes_replacement", "shard_directory"]

NEW = "new"  # in the work directory: shards that will replace those of a finished checkpoint
WRITTEN = (CONFIG, CHECKSUMS, REPORT_FILE, CARD_FILE, INDEX)
REPORT_FIELDS = {"recipe", "layers", "versions"}


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


def shard_directory(output: Path, *, overwrite: bool) -> Path:
    """Where a run writes its shards: the output itself, or a directory beside the checkpoint that they will replace.

    A replacement that was cut off while it was put in place is put in place first.
    """
    work = output / WORK_DIRECTORY
    new = work / NEW
    if not (output / INDEX).exists():
        if new.is_dir():
            put_in_place(output)
        return output
    if not overwrite and not new.is_dir():
        return output  # a run that was killed after its last file
    if not new.is_dir():
        clear_work(work)
    make_directory(new / WORK_DIRECTORY)
    return new


def resumes_replacement(output: Path) -> bool:
    """Whether a finished checkpoint is being replaced."""
    return (output / INDEX).exists() and (output / WORK_DIRECTORY / NEW).is_dir()


def put_in_place(output: Path) -> None:
    """Give up the old checkpoint, the index first, and move the new shards to where its own were.

    It may be cut off anywhere and begun again.
    """
    work = output / WORK_DIRECTORY
    new = work / NEW
    remove_file(output / INDEX)
    kept = {*recorded_files(output), *(path.name for path in new.iterdir()), CHECKSUMS}  # the list to the very end
    for name in sorted(_own_files(output) - kept):
        remove_tree(output / name)
    for source, target in ((new / WORK_DIRECTORY, work), (new, output)):
        for path in sorted(source.iterdir()) if source.is_dir() else ():
            if path.is_file() and not path.name.startswith("."):
                move_file(path, target / path.name)
    remove_tree(new)


def clear_output(output: Path, shards: Path) -> None:
    """Remove what an earlier run left of its work, and of its results those that lie where this one's will.

    Of anybody else's files nothing is touched. The index goes first, so that what is left never looks whole; the
    journal stays, to be read by whoever comes after a kill.
    """
    work = output / WORK_DIRECTORY
    _clear_shards(work)
    if shards != output:
        remove_tree(shards)
        make_directory(shards / WORK_DIRECTORY)
        return
    remove_tree(work / NEW)
    remove_file(output / INDEX)
    own = _own_files(output)
    for entry in sorted(output.iterdir()):
        if entry.name in own or _is_half_written(entry.name):
            remove_tree(entry)


def clear_work(work: Path) -> None:
    """Empty the work directory of a run that has ended, but for its lock.

    The journal goes last: for as long as it is there, the same command ends the run once more.
    """
    _clear_shards(work)
    remove_tree(work / NEW)
    remove_file(work / WORK_JOURNAL)


def _clear_shards(work: Path) -> None:
    for entry in sorted(work.iterdir()):
        name = entry.name.removeprefix(".").removesuffix(".tmp")
        if name.endswith(".safetensors") or (name == WORK_JOURNAL and name != entry.name):
            remove_tree(entry)


def _is_half_written(name: str) -> bool:
    """Whether a kill left it so."""
    whole = name.removeprefix(".").removesuffix(".tmp")
    known = whole in (*WRITTEN, *COMPANIONS) or SHARD.fullmatch(whole) is not None
    return name == f".{whole}.tmp" and known


def _own_files(output: Path) -> set[str]:
    """The files of a checkpoint, or of an unfinished one, that bitwright wrote there.

    Shards are known by their names: where this is asked, the directory was empty before, or held a checkpoint of ours.
    """
    own = {CHECKSUMS, INDEX, *listed_files(output)}
    own.update(path.name for path in output.iterdir() if SHARD.fullmatch(path.name))
    if _is_report(output / REPORT_FILE):
        own.add(REPORT_FILE)
    try:
        if CARD_MARK in (output / CARD_FILE).read_text(encoding="utf-8", errors="replace"):
            own.add(CARD_FILE)
    except OSError:
        pass  # there is none
    return own


def _is_report(path: Path) -> bool:
    try:
        record = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(record, dict) and record.keys() >= REPORT_FIELDS


def _refusal(output: Path, source: Path | None, *, overwrite: bool) -> tuple[str, str] | None:
    """What is wrong with the directory, and what to do."""
    if output.exists() and not output.is_dir():
        return f"{output} is a file", "give a directory that is new or empty"
    above = next((folder for folder in output.parents if folder.exists()), None)
    if above is not None and not above.is_dir():
        return f"{output} cannot be made: {above} is a file", "give a directory that is new or empty"
    if source is not None and output.resolve() == source.resolve():
        return f"{output} is the source model itself", "choose another output directory"
    work = output / WORK_DIRECTORY
    if work.is_symlink():  # what it leads to would be emptied
        return f"{work} is a link", "remove it, or choose another output directory"
    if not output.is_dir() or not any(entry != work for entry in output.iterdir()):
        return None
    if not (work / WORK_JOURNAL).exists():  # else unfinished: the journal decides whether it can be resumed
        if not ((output / INDEX).exists() and _is_report(output / REPORT_FILE)):
            return f"{output} holds files that are not a checkpoint of bitwright", "choose another directory"
        if not overwrite:
            return f"{output} holds a finished checkpoint", "choose another directory, or replace it with --overwrite"
    own = _own_files(output)
    copied = [name for name in COMPANIONS if source is not None and (source / name).exists()]
    taken = [name for name in (*WRITTEN, *copied) if (output / name).exists() and name not in own]
    if taken:
        return f"{output} holds files that bitwright did not write: {', '.join(taken)}", "move them to another place"
    return None
