"""What a safetensors file says it holds, checked by every rule of the format before anything is allocated for it.

The file is eight bytes of header length (little endian), a JSON header, then the bytes of all tensors without gaps. The
header is read by a parser of exactly this grammar, not of JSON at large: memory stays a small multiple of the header
whatever it holds, numbers and nesting have bounds, and each complaint has its byte. Standard library only.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from bitwright.core.errors import BitwrightError

__all__ = ["DTYPE_BITS", "FileIndex", "TensorEntry", "parse_header", "read_index"]

# Far beyond what models have. One character outside of the common ones makes a string take four bytes for each of its
# characters: bounds on names and metadata keep that, too, within what the header itself takes.
MAX_HEADER = 32 << 20
MAX_METADATA = 8 << 20
MAX_TENSORS = 1 << 16
MAX_NAME = 256
MAX_ELEMENTS = (1 << 63) - 1

# In the order in which the reference implementation sorts them; F4 and F6 do not fill whole bytes.
DTYPE_BITS: dict[str, int] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a file: the format's name of its dtype, its shape, and its bytes ``[start, end)`` in the file.

    ``pieces``: where only some of those bytes are its own, those, ``[start, end)`` one after the other.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    pieces: tuple[tuple[int, int], ...] = ()

    @property
    def nbytes(self) -> int:
        return sum(end - start for start, end in self.ranges)

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """The bytes that are its own."""
        return self.pieces or ((self.start, self.end),)

    def rows(self, ranges: Sequence[tuple[int, int]]) -> TensorEntry:
        """The tensor of only some rows ``[first, end)``, which must be there, one range after the other."""
        count = self.shape[0]
        width = self.nbytes // count
        found: list[tuple[int, int]] = []
        for first, end in ranges:
            if not 0 <= first <= end <= count:
                raise ValueError(f"rows {first} to {end} of {count}")
            found += _cut(self.ranges, first * width, end * width)
        shape = (sum(end - first for first, end in ranges), *self.shape[1:])
        if not found:
            return TensorEntry(self.dtype, shape, self.start, self.start)
        pieces = tuple(found) if len(found) > 1 else ()
        return TensorEntry(self.dtype, shape, min(found)[0], max(end for _, end in found), pieces)


@dataclass(frozen=True, slots=True)
class FileIndex:
    """A valid safetensors file: its tensors in the order of the header, its metadata, its size in bytes."""

    path: Path
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]
    size: int


def _cut(ranges: Sequence[tuple[int, int]], first: int, end: int) -> list[tuple[int, int]]:
    """The bytes ``[first, end)`` of ranges that are counted through."""
    found, passed = [], 0
    for start, stop in ranges:
        low, high = max(first - passed, 0), min(end - passed, stop - start)
        if low < high:
            found.append((start + low, start + high))
        passed += stop - start
    return found


def read_index(path: Path) -> FileIndex:
    """Read and check the header of a safetensors file.

    Checked in one pass: header length, UTF-8, JSON grammar, duplicate names, dtypes, shapes and their products, and
    that the tensors fill the rest of the file without gap or overlap.

    Raises:
        BitwrightError: BW302 naming the file, the broken rule and the byte; BW303 if there is no such file.
    """
    try:
        # Without O_NONBLOCK a named pipe would wait here for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        what = f"{path.name} is missing"
        raise BitwrightError("BW303", what, where=str(path), suggestion="fetch it again") from error
    except (OSError, ValueError) as error:
        _refuse(path, f"the file cannot be opened: {error}", 0)
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            _refuse(path, "it must be a regular file", 0)
        header = _read_header(descriptor, status.st_size, path)
    except OSError as error:
        _refuse(path, f"the file cannot be read: {error}", 0)
    finally:
        os.close(descriptor)
    return parse_header(header, status.st_size, path)


def parse_header(header: bytes, file_size: int, path: Path) -> FileIndex:
    """Check the JSON header (without its length) of a file of ``file_size`` bytes; ``path`` is for messages only.

    Raises:
        BitwrightError: BW302.
    """
    parser = _Parser(header, path)
    parser.run()
    _check_coverage(parser.tensors, 8 + len(header), file_size, path)
    return FileIndex(path, parser.tensors, parser.metadata, file_size)


def _read_header(descriptor: int, file_size: int, path: Path) -> bytes:
    if file_size < 8:
        _refuse(path, f"a file begins with 8 bytes of header length; it has {file_size} bytes", file_size)
    length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
    if length > MAX_HEADER:
        _refuse(path, f"the header is {length} bytes long; at most {MAX_HEADER} are allowed", 0)
    if length > file_size - 8:
        _refuse(path, f"the header is {length} bytes long, but only {file_size - 8} bytes follow its length", 0)
    if length < 2:
        _refuse(path, f"a header of {length} bytes cannot hold a JSON object", 0)
    header = os.pread(descriptor, length, 8)
    if len(header) != length:
        _refuse(path, f"the file ends inside its header, which is {length} bytes long", 8 + len(header))
    return header


def _refuse(path: Path, rule: str, byte: int) -> NoReturn:
    raise BitwrightError(
        "BW302",
        f"{path.name} is not a valid safetensors file: {rule} (at byte {byte})",
        where=f"{path}, byte {byte}",
        why="the file is damaged, or was cut off while it was copied",
        suggestion="fetch this file again",
    )


SPACE = rb"[ \t\n\r]*+"
# Possessive (*+): nothing to backtrack into, so a string of megabytes takes no memory beyond its own.
STRING = rb'"([^"\\\x00-\x1f]*+(?:\\["\\/bfnrtu][^"\\\x00-\x1f]*+)*+)"'
NUMBER = rb"(?:0|[1-9][0-9]{0,18})(?![0-9.eE])" + SPACE
OPEN = re.compile(SPACE + rb"\{" + SPACE)
CLOSE = re.compile(SPACE + rb"\}" + SPACE)
COMMA = re.compile(SPACE + rb"," + SPACE)
KEY = re.compile(STRING + SPACE + rb":" + SPACE)
VALUE = re.compile(STRING)
# Not possessive: before Python 3.11.5 a possessive repeat loses its place where what is repeated can backtrack.
LIST = rb"\[" + SPACE + rb"((?:" + NUMBER + rb"(?:," + SPACE + rb"(?=[0-9])|(?=\]))){0,64})\]"
FIELD = re.compile(
    rb'"(dtype|shape|data_offsets)"' + SPACE + rb":" + SPACE + rb'(?:"([A-Z0-9_]{1,16})"|' + LIST + rb")"
)


class _Parser:
    """One pass over the header; ``position`` is where it stands."""

    def __init__(self, header: bytes, path: Path) -> None:
        self.header, self.path, self.position = header, path, 0
        self.tensors: dict[str, TensorEntry] = {}
        self.metadata: dict[str, str] = {}
        self.has_metadata = False

    def refuse(self, rule: str, position: int | None = None) -> NoReturn:
        _refuse(self.path, rule, 8 + (self.position if position is None else position))

    def take(self, pattern: re.Pattern[bytes], wanted: str) -> re.Match[bytes]:
        match = pattern.match(self.header, self.position)
        if match is None:
            self.refuse(f"the JSON header should go on with {wanted}")
        self.position = match.end()
        return match

    def skip(self, pattern: re.Pattern[bytes]) -> bool:
        match = pattern.match(self.header, self.position)
        if match is not None:
            self.position = match.end()
        return match is not None

    def run(self) -> None:
        if self.header[:1] != b"{":
            self.refuse("the JSON header must begin with '{'")
        self.take(OPEN, "'{'")
        if not self.skip(CLOSE):
            self.member()
            while not self.skip(CLOSE):
                self.take(COMMA, "',' or '}'")
                self.member()
        if self.position != len(self.header):
            self.refuse("nothing but spaces may follow the JSON header")

    def member(self) -> None:
        start = self.position
        key = self.take(KEY, "a name in quotes and ':'")
        is_long = key.end(1) - key.start(1) > MAX_NAME * len("\\u0000")
        name = "" if is_long else self.text(key)
        if name == "__metadata__":
            self.take_metadata(start)
            return
        if not name or len(name) > MAX_NAME or not name.isprintable():
            self.refuse(f"a tensor name is 1 to {MAX_NAME} printable characters", start)
        if name in self.tensors:
            self.refuse(f"the name {name!r} occurs twice", start)
        if len(self.tensors) == MAX_TENSORS:
            self.refuse(f"there are more than {MAX_TENSORS} tensors", start)
        self.tensors[name] = self.take_entry(name, start)

    def text(self, match: re.Match[bytes]) -> str:
        """A string, unescaped; it must be UTF-8 and, so that it can be written again, hold no lone surrogate."""
        raw = match[1]
        try:
            if b"\\" not in raw:
                return raw.decode("utf-8")
            text = json.loads(match.string[match.start(1) - 1 : match.end(1) + 1])
            text.encode("utf-8")
        except UnicodeDecodeError as error:
            self.refuse("strings must be UTF-8", match.start(1) + error.start)
        except ValueError:
            self.refuse("a string holds an escape sequence that stands for no character", match.start(1))
        return str(text)

    def take_metadata(self, start: int) -> None:
        if self.has_metadata:
            self.refuse("'__metadata__' occurs twice", start)
        self.has_metadata = True
        self.take(OPEN, "'{': metadata is an object of strings")
        is_first = True
        while not self.skip(CLOSE):
            if not is_first:
                self.take(COMMA, "',' or '}'")
            is_first = False
            position = self.position
            key_match = self.take(KEY, "a metadata name in quotes and ':'")
            value_match = self.take(VALUE, "a string: metadata values are strings")
            if self.position - start > MAX_METADATA or len(self.metadata) == MAX_TENSORS:
                self.refuse(f"metadata are at most {MAX_TENSORS} entries and {MAX_METADATA} bytes", position)
            key = self.text(key_match)
            if key in self.metadata:
                self.refuse(f"the metadata name {key[:80]!r} occurs twice", position)
            self.metadata[key] = self.text(value_match)

    def take_entry(self, name: str, start: int) -> TensorEntry:
        """The dtype, shape and offsets of one tensor, in any order, each once, and consistent with each other."""
        self.take(OPEN, f"'{{': {name!r} is an object")
        dtype: str | None = None
        numbers: dict[bytes, tuple[int, ...]] = {}
        for remaining in (2, 1, 0):
            field = self.take(FIELD, f"the dtype, shape or data_offsets of {name!r}, made of whole numbers from 0")
            key, text, digits = field[1], field[2], field[3]
            if (key == b"dtype") != (text is not None):
                self.refuse(f"{key.decode()} of {name!r} is of the wrong kind", field.start())
            if key in numbers or (key == b"dtype" and dtype is not None):
                self.refuse(f"{name!r} has {key.decode()} twice", field.start())
            if text is not None:
                dtype = text.decode()
            else:
                numbers[key] = tuple(map(int, digits.split(b","))) if digits else ()
            if remaining:
                self.take(COMMA, f"',': {name!r} has a dtype, a shape and data_offsets")
        self.take(CLOSE, f"'}}': {name!r} has a dtype, a shape and data_offsets, no more")
        assert dtype is not None
        return self.checked_entry(name, dtype, numbers[b"shape"], numbers[b"data_offsets"], start)

    def checked_entry(
        self, name: str, dtype: str, shape: tuple[int, ...], offsets: tuple[int, ...], start: int
    ) -> TensorEntry:
        bits = DTYPE_BITS.get(dtype)
        if bits is None:
            self.refuse(f"{name!r} has the unknown dtype {dtype!r}", start)
        elements = 1
        for size in shape:
            elements *= max(size, 1)  # zero must not hide the sizes beside it: strides are made of them
            if elements > MAX_ELEMENTS:
                self.refuse(f"the shape of {name!r} has more elements than can be addressed", start)
        elements = 0 if 0 in shape else elements
        if len(offsets) != 2 or offsets[0] > offsets[1]:
            self.refuse(f"the data_offsets of {name!r} must be a start and an end not before it", start)
        if elements * bits != (offsets[1] - offsets[0]) * 8:
            got, wanted = offsets[1] - offsets[0], -(-elements * bits // 8)
            self.refuse(f"{name!r} is {dtype} {list(shape)}, which takes {wanted} bytes, not {got}", start)
        base = 8 + len(self.header)
        return TensorEntry(dtype, shape, base + offsets[0], base + offsets[1])


def _check_coverage(tensors: Mapping[str, TensorEntry], base: int, file_size: int, path: Path) -> None:
    """The tensors, in the order of their bytes, follow each other from the end of the header to the end of the file."""
    position, previous = base, ""
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.start < position:
            _refuse(path, f"the bytes of {name!r} overlap those of {previous!r}", entry.start)
        if entry.start > position:
            _refuse(path, f"{entry.start - position} bytes before {name!r} belong to no tensor", position)
        position, previous = entry.end, name
        if position > file_size:
            _refuse(path, f"{name!r} should end at byte {position}, but the file has {file_size} bytes", file_size)
    if position != file_size:
        _refuse(path, f"{file_size - position} bytes after the last tensor belong to no tensor", position)
