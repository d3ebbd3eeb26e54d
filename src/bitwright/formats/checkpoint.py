"""A model directory, opened: its configuration and where each tensor lies. No tensor is read until it is asked for."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.formats.directory import find_file, locate_file, read_object
from bitwright.formats.fused import Part, find_family, unfuse
from bitwright.formats.safetensors_file import FileTensor, open_source, read_tensor
from bitwright.formats.safetensors_index import FileIndex, TensorEntry, read_index
from bitwright.formats.sidecar import read_sidecar

__all__ = [
    "CONFIG",
    "INDEX",
    "SHARD",
    "SINGLE",
    "WORK_DIRECTORY",
    "WORK_JOURNAL",
    "Checkpoint",
    "StoredTensor",
    "list_names",
    "open_checkpoint",
]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
WORK_DIRECTORY = ".bitwright"
WORK_JOURNAL = "journal.jsonl"
SHARD = re.compile(r"model-(\d{5})-of-(\d{5})\.safetensors")
OLD_GPTQ = re.compile(r"gptq_model[\w.-]*\.safetensors")  # AutoGPTQ put bits and group into the name
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CONFIG_LIMIT = 8 << 20
INDEX_LIMIT = 32 << 20
MAX_SHARDS = 4096


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: the name of its file in the directory, and its entry in that file's index."""

    file: str
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model directory whose every index has been checked.

    Attributes:
        directory: where it lies.
        config: ``config.json``, with the ``quantization_config`` that old checkpoints have in a file of its own.
        tensors: every tensor by name. Those of a family with fused weights have the names, and ``config`` the fields,
            of the model that it is (:mod:`bitwright.formats.fused`); but tensors of quantized layers have the names
            that they have in the files, by which the record of quantization goes.
        files: the weight files by name, and their sizes in bytes.
        metadata: the metadata of the first weight file.
        parts: of each quantized layer of such a family, by its name in the files, the layers of the model that it is.
    """

    directory: Path
    config: dict[str, Any]
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, int]
    metadata: Mapping[str, str]
    parts: Mapping[str, tuple[Part, ...]] = field(default_factory=dict)

    @property
    def quantization(self) -> dict[str, Any] | None:
        """The ``quantization_config`` of ``config.json``, or ``None`` for a float checkpoint.

        Raises:
            BitwrightError: BW311 if it is there but not an object.
        """
        record = self.config.get("quantization_config")
        if record is not None and not isinstance(record, dict):
            where = str(self.directory / CONFIG)
            suggestion = "fetch config.json again"
            raise BitwrightError("BW311", "quantization_config is not an object", where=where, suggestion=suggestion)
        return record

    def stored(self, name: str) -> StoredTensor:
        """Where the tensor ``name`` lies.

        Raises:
            BitwrightError: BW303 if there is none of this name.
        """
        stored = self.tensors.get(name)
        if stored is None:
            what = f"the checkpoint has no tensor {name}"
            raise BitwrightError("BW303", what, where=str(self.directory), suggestion="fetch the model again")
        return stored

    def read(self, name: str) -> Tensor:
        """Read one tensor into fresh memory.

        Raises:
            BitwrightError: BW303 if there is none of this name, BW302 or BW304 if it cannot be read.
        """
        stored = self.stored(name)
        return read_tensor(self.directory / stored.file, stored.entry)

    def source(self, name: str) -> FileTensor:
        """One tensor, to be streamed in chunks.

        Raises:
            BitwrightError: BW303 if there is none of this name, BW304 if torch has no such dtype.
        """
        stored = self.stored(name)
        return open_source(self.directory / stored.file, stored.entry)


def open_checkpoint(directory: Path) -> Checkpoint:
    """Open a directory of ``config.json`` and safetensors weights (one file, or shards with or without an index).

    Raises:
        BitwrightError: BW301 not a model, BW302 an invalid weight file, BW303 shards or tensors missing or
            unexpected, BW304 or BW306 fused weights that are not known, BW305 pickle weights only, BW307 an invalid
            ``config.json``, BW308 an unfinished output, BW310 an unsafe name, BW311 an unreadable record of
            quantization in a file of its own.
    """
    names = _list_directory(directory)
    config = _read_config(directory, names)
    # With both a single file and an index, the single file counts: transformers chooses so too.
    weight_map = _read_weight_map(directory) if INDEX in names and SINGLE not in names else None
    files = sorted(set(weight_map.values())) if weight_map is not None else _find_weight_files(directory, names)
    indexes = _read_indexes(directory, files)
    tensors = _merge(directory, indexes)
    if config.get("quantization_config") is None and any(name.endswith(".qweight") for name in tensors):
        record = read_sidecar(directory, names)
        config = config if record is None else {**config, "quantization_config": record}
    if weight_map is not None:
        _check_weight_map(directory, weight_map, tensors)
    sizes = {index.path.name: index.size for index in indexes}
    if find_family(config) is None:
        return Checkpoint(directory, config, tensors, sizes, indexes[0].metadata)
    found = unfuse(directory, config, {name: stored.entry for name, stored in tensors.items()})
    tensors = {name: StoredTensor(tensors[old].file, entry) for name, (old, entry) in found.tensors.items()}
    return Checkpoint(directory, found.config, tensors, sizes, indexes[0].metadata, found.parts)


def list_names(names: Iterable[str]) -> str:
    """The first five names, and how many more there are."""
    ordered = sorted(names)
    more = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(ordered[:5]) + more


def _list_directory(directory: Path) -> set[str]:
    try:
        return set(os.listdir(directory))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        suggestion = "give the directory that holds config.json and *.safetensors"
        what = f"{directory} cannot be read: {reason}"
        raise BitwrightError("BW301", what, where=str(directory), suggestion=suggestion) from error


def _read_config(directory: Path, names: set[str]) -> dict[str, Any]:
    # A directory of that name, beside other things and without a journal, is somebody else's.
    is_unfinished = names == {WORK_DIRECTORY} or (directory / WORK_DIRECTORY / WORK_JOURNAL).exists()
    if is_unfinished and not {SINGLE, INDEX} & names:
        raise BitwrightError(
            "BW308",
            f"{directory} is the output of a run that has not ended",
            where=str(directory / WORK_DIRECTORY),
            suggestion="run the same 'bitwright quantize' command again: it resumes where the run stopped",
        )
    path = find_file(directory, CONFIG) if CONFIG in names else None
    if path is None:
        suggestion = "give the directory that holds config.json and *.safetensors"
        raise BitwrightError("BW301", f"{directory} has no {CONFIG}", where=str(directory), suggestion=suggestion)
    return read_object(path, code="BW307", limit=CONFIG_LIMIT)


def _read_weight_map(directory: Path) -> dict[str, str]:
    """Tensor name to file name, from the index; each file name is checked by itself when it is opened."""
    path = locate_file(directory, INDEX)
    weight_map = read_object(path, code="BW303", limit=INDEX_LIMIT).get("weight_map")
    is_map = isinstance(weight_map, dict) and all(isinstance(file, str) for file in weight_map.values())
    if not isinstance(weight_map, dict) or not weight_map or not is_map:
        what = f"{INDEX} has no weight_map from tensor names to file names"
        raise BitwrightError("BW303", what, where=str(path), suggestion="fetch this file again")
    if len(set(weight_map.values())) > MAX_SHARDS:
        what = f"{INDEX} names more than {MAX_SHARDS} files"
        raise BitwrightError("BW303", what, where=str(path), suggestion="fetch this file again")
    return weight_map


def _find_weight_files(directory: Path, names: set[str]) -> list[str]:
    """Without an index: the single file, a complete set of numbered shards, or the one file of an old GPTQ writer."""
    if SINGLE in names:
        return [SINGLE]
    shards = {name: SHARD.fullmatch(name) for name in names}
    totals = {match[2] for match in shards.values() if match is not None}
    if len(totals) == 1:
        total = totals.pop()
        if 0 < int(total) <= MAX_SHARDS:
            return [f"model-{number:05d}-of-{total}.safetensors" for number in range(1, int(total) + 1)]
    old = [name for name in names if OLD_GPTQ.fullmatch(name)]
    if len(old) == 1:
        return old
    if any(name.endswith(PICKLES) for name in names):
        raise _pickle_refusal(directory, next(name for name in sorted(names) if name.endswith(PICKLES)))
    what = f"{directory} holds no {SINGLE} and no complete set of numbered shards"
    suggestion = "give the directory that holds config.json and *.safetensors"
    raise BitwrightError("BW301", what, where=str(directory), suggestion=suggestion)


def _pickle_refusal(directory: Path, name: str) -> BitwrightError:
    return BitwrightError(
        "BW305",
        f"{name} is a pickle, and such files can run code when they are read",
        where=str(directory / name),
        suggestion="convert it where you trust it: load the model with transformers and call "
        "save_pretrained(..., safe_serialization=True)",
    )


def _read_indexes(directory: Path, files: list[str]) -> list[FileIndex]:
    paths = []
    for file in files:
        if file.endswith(PICKLES):
            raise _pickle_refusal(directory, file)
        paths.append(locate_file(directory, file))
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        what = f"{len(missing)} of {len(files)} weight files are missing: {list_names(missing)}"
        raise BitwrightError("BW303", what, where=str(directory), suggestion="fetch the missing files")
    return [read_index(path) for path in paths]


def _merge(directory: Path, indexes: list[FileIndex]) -> dict[str, StoredTensor]:
    tensors: dict[str, StoredTensor] = {}
    for index in indexes:
        file = index.path.name
        twice = [name for name in index.tensors if name in tensors]
        if twice:
            what = f"{len(twice)} tensors of {file} are in another file too: {list_names(twice)}"
            raise BitwrightError("BW303", what, where=str(directory), suggestion="remove the file that does not belong")
        tensors.update({name: StoredTensor(file, entry) for name, entry in index.tensors.items()})
    if not tensors:
        suggestion = "fetch the model again"
        raise BitwrightError("BW303", "the weight files hold no tensors", where=str(directory), suggestion=suggestion)
    return tensors


def _check_weight_map(directory: Path, weight_map: dict[str, str], tensors: dict[str, StoredTensor]) -> None:
    """What the index says is where it says, and nothing else is there."""
    wrong = [name for name, file in weight_map.items() if name not in tensors or tensors[name].file != file]
    extra = [name for name in tensors if name not in weight_map]
    complaints = [f"{len(wrong)} tensors are not in the file that {INDEX} names: {list_names(wrong)}"] if wrong else []
    complaints += [f"{len(extra)} tensors are in no entry of {INDEX}: {list_names(extra)}"] if extra else []
    if complaints:
        where = str(directory / INDEX)
        suggestion = "fetch the shards and the index again, from one version of the model"
        raise BitwrightError("BW303", "; ".join(complaints), where=where, suggestion=suggestion)
