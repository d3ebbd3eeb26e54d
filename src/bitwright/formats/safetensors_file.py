"""Tensors to and from safetensors files, streamed: no whole file and, where possible, no whole tensor in memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.core.memory import use_huge_pages
from bitwright.formats.safetensors_index import DTYPE_BITS, TensorEntry

__all__ = ["DTYPES", "FileTensor", "TensorSource", "open_source", "read_tensor", "serialize"]

CHUNK = 2 << 20  # streamed at a time: small enough to stay in cache from where it is read to where it is used
PIECE = 16 << 20  # read by one call into a tensor
DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8,
    "F8_E5M2": torch.float8_e5m2, "F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16, "BF16": torch.bfloat16,
    "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32,
    "C64": torch.complex64, "F64": torch.float64, "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
RANK = {name: rank for rank, name in enumerate(DTYPE_BITS)}
DEFAULT_METADATA: Mapping[str, str] = MappingProxyType({"format": "pt"})


class TensorSource(Protocol):
    """A tensor that is streamed: its bytes come in chunks, in order, and need never be held at once."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    def chunks(self) -> Iterator[bytes | memoryview]: ...


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor that lies in a file (a :class:`TensorSource`)."""

    path: Path
    entry: TensorEntry

    @property
    def dtype(self) -> torch.dtype:
        return _dtype(self.path, self.entry)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.entry.shape

    def chunks(self) -> Iterator[bytes | memoryview]:
        """The bytes of the tensor, 2 MiB at a time.

        Raises:
            BitwrightError: BW302 if the file has become shorter than its index says.
        """
        descriptor = _open(self.path)
        try:
            for first, end in self.entry.ranges:
                for start in range(first, end, CHUNK):
                    wanted = min(CHUNK, end - start)
                    try:
                        chunk = os.pread(descriptor, wanted, start)
                    except OSError as error:
                        raise _unreadable(self.path, error) from error
                    if len(chunk) != wanted:
                        raise _truncated(self.path, self.entry)
                    yield chunk
        finally:
            os.close(descriptor)


def open_source(path: Path, entry: TensorEntry) -> FileTensor:
    """A tensor of a file, to be streamed.

    Raises:
        BitwrightError: BW304 if torch has no such dtype.
    """
    _dtype(path, entry)
    return FileTensor(path, entry)


def read_tensor(path: Path, entry: TensorEntry) -> Tensor:
    """Read a tensor into fresh memory. (Pages of a mapped file would count as resident for as long as it is mapped.)

    Raises:
        BitwrightError: BW302 if the file has become shorter than its index says, BW304 if torch has no such dtype.
    """
    tensor = use_huge_pages(torch.empty(entry.shape, dtype=_dtype(path, entry)))
    view = _bytes_of(tensor)
    descriptor = _open(path)
    try:
        for position, end in entry.ranges:
            while position < end:
                count = os.preadv(descriptor, [view[: min(PIECE, end - position)]], position)
                if count == 0:
                    raise _truncated(path, entry)
                view, position = view[count:], position + count
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(descriptor)
    return tensor


def serialize(
    tensors: Mapping[str, Tensor | TensorSource], metadata: Mapping[str, str] = DEFAULT_METADATA
) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, in chunks that are views of the tensors' own memory.

    The same tensors give the same bytes, those of the reference implementation: widest dtypes first (so that each
    tensor is aligned), then by name, whatever the order of ``tensors``.

    Raises:
        BitwrightError: BW304 for a dtype that the format does not have.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-RANK[_name(*item)], item[0]))
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for name, tensor in ordered:
        size = _size(tensor)
        offsets = [position, position + size]
        header[name] = {"dtype": _name(name, tensor), "shape": list(tensor.shape), "data_offsets": offsets}
        position += size
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, tensor in ordered:
        if isinstance(tensor, Tensor):
            yield _bytes_of(tensor.detach().cpu().contiguous())
        else:
            yield from tensor.chunks()


def _bytes_of(tensor: Tensor) -> memoryview:
    """The memory of a contiguous tensor; through uint8, since numpy knows neither bf16 nor fp8.

    (A dimension of one element may have any stride and still be contiguous, but not be viewed as bytes.)
    """
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8).numpy().data


def _size(tensor: Tensor | TensorSource) -> int:
    size = tensor.dtype.itemsize
    for extent in tensor.shape:
        size *= extent
    return size


def _name(name: str, tensor: Tensor | TensorSource) -> str:
    if tensor.dtype not in NAMES:
        what = f"{name} is {tensor.dtype}, which safetensors files cannot hold"
        raise BitwrightError("BW304", what, suggestion="convert it to float32, float16 or bfloat16 first")
    return NAMES[tensor.dtype]


def _dtype(path: Path, entry: TensorEntry) -> torch.dtype:
    if entry.dtype not in DTYPES:
        what = f"{path.name} holds a tensor of dtype {entry.dtype}, which torch does not have"
        suggestion = "convert the model to float32, float16 or bfloat16 where it was made"
        raise BitwrightError("BW304", what, where=str(path), suggestion=suggestion)
    return DTYPES[entry.dtype]


def _open(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        what, suggestion = (
            f"{path.name} cannot be opened: {error.strerror}",
            "make it readable, or fetch this file again",
        )
        raise BitwrightError("BW303", what, where=str(path), suggestion=suggestion) from error


def _unreadable(path: Path, error: OSError) -> BitwrightError:
    what = f"{path.name} cannot be read: {error.strerror}"
    return BitwrightError("BW302", what, where=str(path), suggestion="check the disk, and fetch this file again")


def _truncated(path: Path, entry: TensorEntry) -> BitwrightError:
    size = path.stat().st_size if path.exists() else 0
    return BitwrightError(
        "BW302",
        f"{path.name} has {size} bytes, but a tensor should end at byte {entry.end}",
        where=str(path),
        why="the file changed after it was opened",
        suggestion="fetch this file again",
    )
