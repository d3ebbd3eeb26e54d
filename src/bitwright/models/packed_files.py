"""Packed weights in a file of their own, so that an engine starts the second time without packing anything.

The file is ``MAGIC``, the length of a header (8 bytes, little endian), the SHA-256 of the header, the header in JSON,
and tensors at multiples of 4096 or 64 bytes. The header names the layout, what the weights were packed from and for,
and where each tensor lies. Its numbers are used only if all of that is what the reader expects, byte for byte; whatever
else is in the file is packed anew. A file appears whole, or not at all.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import mmap
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.core.scheme_names import parse
from bitwright.formats.checkpoint import Checkpoint
from bitwright.formats.storage import make_directory, move_file, remove_file, write_file
from bitwright.kernels import native_library
from bitwright.kernels.native_decoder import Block, Dense, PackedFloats
from bitwright.kernels.records import PackedWeight
from bitwright.models.decoder import DecoderShape
from bitwright.models.decoder_weights import LAYERS, DecoderWeights

__all__ = ["LAYOUT", "PACKED", "identify", "load_packed", "packed_bytes", "packed_path", "save_packed"]

MAGIC = b"BWPACK01"
LAYOUT = 1  # of the header and of operands; to be raised whenever either changes
SMALL, LARGE, WHOLE = 64, 4096, 1 << 16  # tensors of WHOLE bytes or more begin at pages
HEADER_LIMIT = 64 << 20
STEM = "[0-9a-f]" * 32  # of the name of every such file
PACKED = f"{STEM}.packed"
PARTS = (f"{STEM}.*.part", f".{STEM}.*.part.tmp")
ABANDONED = 3600.0  # seconds; writing takes a few
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (
    torch.uint8, torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32
)}  # fmt: skip


def identify(checkpoint: Checkpoint, head: str | None) -> dict[str, Any]:
    """What packed weights depend on: the files of the model as they are now, the head's scheme, and this library.

    Files are known by name, size and times: reading them would take as long as packing them.
    """
    files = {}
    for name in sorted(checkpoint.files):
        status = os.stat(checkpoint.directory / name)
        files[name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
    return {
        "layout": LAYOUT,
        "directory": str(checkpoint.directory.resolve()),
        "config": hashlib.sha256(json.dumps(checkpoint.config, sort_keys=True).encode()).hexdigest(),
        "files": files,
        "head": head,
        "instructions": native_library.instruction_set(),
        "library": _library(),
    }


def _library() -> list[int]:
    """Size and time of the compiled kernels, whose operands are not those of another build."""
    found = importlib.util.find_spec("bitwright.kernels._native")
    status = None if found is None or found.origin is None else os.stat(found.origin)
    return [] if status is None else [status.st_size, status.st_mtime_ns]


def packed_path(folder: Path, identity: Mapping[str, Any]) -> Path:
    """Where such weights lie in ``folder``: one file for each model, head and set of instructions, whatever its age."""
    names = [identity[field] for field in ("directory", "head", "instructions")]
    return folder / f"{hashlib.sha256(json.dumps(names).encode()).hexdigest()[:32]}.packed"


def save_packed(weights: DecoderWeights, path: Path, identity: Mapping[str, Any]) -> int:
    """Write ``weights`` to ``path``, whose directory is made if it is missing; gives the size of the file in bytes.

    Whoever writes the same at the same time writes a file of their own first, and one of both is the one that stays.

    Raises:
        BitwrightError: BW501 if it cannot be written.
    """
    header, tensors, starts, end = _lay_out(weights, identity)
    make_directory(path.parent)
    own = path.with_name(f"{path.stem}.{os.getpid()}.part")
    _sweep(path)
    write_file(own, _chunks(header, tensors, starts), size=len(header) + end)
    move_file(own, path)
    return path.stat().st_size


def packed_bytes(weights: DecoderWeights) -> int:
    """The size of the file of ``weights``, but for some KB of what it is to be told by."""
    header, _, _, end = _lay_out(weights, {})
    return len(header) + end


def _lay_out(weights: DecoderWeights, identity: Mapping[str, Any]) -> tuple[bytes, list[Tensor], list[int], int]:
    """The header, the tensors, where each begins behind the header, and where the last ends."""
    tensors: list[Tensor] = []
    record = {"identity": dict(identity), "weights": _describe(weights, tensors)}
    places, starts, end = list[dict[str, Any]](), list[int](), 0
    for tensor in tensors:
        aligned = LARGE if tensor.nbytes >= WHOLE else SMALL
        start = -(-end // aligned) * aligned
        end = start + tensor.nbytes
        starts.append(start)
        places.append({"dtype": str(tensor.dtype).removeprefix("torch."), "shape": list(tensor.shape), "start": start})
    header = json.dumps(record | {"tensors": places, "size": end}).encode()
    begin = len(MAGIC) + 8 + 32 + len(header)
    return header + b" " * (-begin % LARGE), tensors, starts, end


def _sweep(path: Path) -> None:
    """Remove what killed writers of packed weights left beside ``path``, once it is too old to be anybody's."""
    for pattern in PARTS:
        for left in path.parent.glob(pattern):
            try:
                if time.time() - left.stat().st_mtime > ABANDONED:
                    remove_file(left)
            except (OSError, BitwrightError):  # gone by now, or somebody else's
                continue


def _chunks(header: bytes, tensors: Sequence[Tensor], starts: Sequence[int]) -> Iterator[bytes | memoryview]:
    yield MAGIC + len(header).to_bytes(8, "little") + hashlib.sha256(header).digest() + header
    position = 0
    for tensor, start in zip(tensors, starts, strict=True):
        if start > position:
            yield b"\0" * (start - position)
        yield tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data
        position = start + tensor.nbytes


def load_packed(path: Path, identity: Mapping[str, Any]) -> DecoderWeights | None:
    """The weights in ``path``, mapped; ``None`` if there is no such file, or it is not what ``identity`` says."""
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC) + 8 + 32)
            length = int.from_bytes(start[8:16], "little")
            if start[:8] != MAGIC or length > HEADER_LIMIT:
                return None
            header = file.read(length)
            if len(header) != length or hashlib.sha256(header).digest() != start[16:]:
                return None
            record = json.loads(header)
            begin = len(start) + length
            if record["identity"] != identity or os.fstat(file.fileno()).st_size != begin + record["size"]:
                return None
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError, KeyError):
        return None
    if hasattr(mmap, "MADV_WILLNEED"):
        mapped.madvise(mmap.MADV_WILLNEED)
    tensors = [_view(mapped, begin, place) for place in record["tensors"]]
    weights = _rebuild(record["weights"], tensors)
    return weights if _is_sound(weights) else None


def _view(mapped: mmap.mmap, begin: int, place: Mapping[str, Any]) -> Tensor:
    dtype, shape = DTYPES[place["dtype"]], [int(size) for size in place["shape"]]
    count = 1
    for size in shape:
        count *= size
    if not count:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(mapped, dtype=dtype, count=count, offset=begin + int(place["start"])).view(shape)


def _describe(weights: DecoderWeights, tensors: list[Tensor]) -> dict[str, Any]:
    """The records as JSON, in which each tensor is its number in ``tensors``; one that several share has one number."""
    numbers: dict[int, int] = {}

    def number(tensor: Tensor | None) -> int | None:
        if tensor is None:
            return None
        if id(tensor) not in numbers:
            numbers[id(tensor)] = len(tensors)
            tensors.append(tensor)
        return numbers[id(tensor)]

    def operand(weight: PackedWeight | PackedFloats) -> dict[str, Any]:
        shape = list(weight.shape)
        if isinstance(weight, PackedFloats):
            return {"shape": shape, "bits": weight.bits, "codes": number(weight.codes), "scale": number(weight.scale)}
        parts = {name: number(tensor) for name, tensor in weight.tensors.items()}
        return {"shape": shape, "scheme": weight.scheme.name, "tensors": parts}

    def dense(layer: Dense) -> dict[str, Any]:
        scale = number(layer.input_scale)
        return {"weight": operand(layer.weight), "bias": number(layer.bias), "input_scale": scale}

    shape = {field.name: getattr(weights.shape, field.name) for field in fields(DecoderShape)}
    norms = ("attention_norm", "mlp_norm", "query_norm", "key_norm")
    return {
        "shape": shape | {"inverse_frequencies": number(weights.shape.inverse_frequencies)},
        "dtype": str(weights.dtype).removeprefix("torch."),
        "blocks": [
            {name: number(getattr(block, name)) for name in norms}
            | {name: dense(getattr(block, name)) for name in LAYERS}
            | {"window": block.window}
            for block in weights.blocks
        ],
        "embedding": number(weights.embedding) if isinstance(weights.embedding, Tensor) else None,
        "final_norm": number(weights.final_norm),
        "head": dense(weights.head),
    }


def _rebuild(record: Mapping[str, Any], tensors: Sequence[Tensor]) -> DecoderWeights:
    """The inverse of :func:`_describe`; an embedding without tensor is the head's operand."""

    def operand(fields: Mapping[str, Any]) -> PackedWeight | PackedFloats:
        shape = (fields["shape"][0], fields["shape"][1])
        if "bits" in fields:
            return PackedFloats(shape, fields["bits"], tensors[fields["codes"]], tensors[fields["scale"]])
        parts = {name: tensors[number] for name, number in fields["tensors"].items()}
        return PackedWeight(scheme=parse(fields["scheme"]), shape=shape, tensors=parts)

    def vector(number: int | None) -> Tensor | None:
        return None if number is None else tensors[number]

    def dense(fields: Mapping[str, Any]) -> Dense:
        weight = operand(fields["weight"])
        return Dense(weight=weight, bias=vector(fields["bias"]), input_scale=vector(fields["input_scale"]))

    shape = {**record["shape"], "windows": tuple(record["shape"]["windows"])}
    head = dense(record["head"])
    return DecoderWeights(
        shape=DecoderShape(**shape | {"inverse_frequencies": tensors[shape["inverse_frequencies"]]}),
        dtype=DTYPES[record["dtype"]],
        blocks=tuple(
            Block(
                attention_norm=tensors[block["attention_norm"]], mlp_norm=tensors[block["mlp_norm"]],
                query_norm=vector(block["query_norm"]), key_norm=vector(block["key_norm"]), window=block["window"],
                **{name: dense(block[name]) for name in LAYERS},
            )
            for block in record["blocks"]
        ),
        embedding=head.weight if record["embedding"] is None else tensors[record["embedding"]],
        final_norm=tensors[record["final_norm"]],
        head=head,
    )  # fmt: skip


def _is_sound(weights: DecoderWeights) -> bool:
    """Whether no index leads out of a layer; sizes are checked where the native records are made."""
    for dense in weights.denses():
        order = dense.weight.tensors.get("order") if isinstance(dense.weight, PackedWeight) else None
        if order is not None and not -1 <= int(order.min()) <= int(order.max()) < dense.weight.shape[1]:
            return False
    return True
