"""Headers of safetensors files: what is valid is read as JSON would read it, what is not is named with its byte."""

from __future__ import annotations

import errno
import json
import math
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bitwright.core.errors import BitwrightError
from bitwright.formats import safetensors_index
from bitwright.formats.safetensors_index import DTYPE_BITS, MAX_HEADER, TensorEntry, read_index

ROOT = Path(__file__).resolve().parents[2]
GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def _file(path: Path, header: bytes, data: int, *, length: int | None = None) -> Path:
    size = len(header) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + header + bytes(data))
    return path


def test_a_valid_header_is_read(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt", "ü\n": ""},
        "b": {"data_offsets": [24, 26], "dtype": "BF16", "shape": []},
        "empty": {"dtype": "I64", "shape": [4, 0], "data_offsets": [24, 24]},
        'a "quoted" \\ ü 🙂': {"shape": [2, 3], "dtype": "F32", "data_offsets": [0, 24]},
        "last": {"dtype": "F4", "shape": [6], "data_offsets": [26, 29]},
    }
    text = json.dumps(header).encode() + b"   "
    index = read_index(_file(tmp_path / "x.safetensors", text, 29))
    base = 8 + len(text)
    assert dict(index.tensors) == {
        "b": TensorEntry("BF16", (), base + 24, base + 26),
        "empty": TensorEntry("I64", (4, 0), base + 24, base + 24),
        'a "quoted" \\ ü 🙂': TensorEntry("F32", (2, 3), base, base + 24),
        "last": TensorEntry("F4", (6,), base + 26, base + 29),
    }
    assert index.metadata == header["__metadata__"] and index.size == base + 29
    assert index.tensors["b"].nbytes == 2


def test_a_file_may_hold_nothing(tmp_path: Path) -> None:
    assert read_index(_file(tmp_path / "x", b"{}", 0)).tensors == {}


def _entry(**change: Any) -> bytes:
    return json.dumps({"a": {**GOOD["a"], **change}}).encode()


def _raw(entry: str) -> bytes:
    return ('{"a":' + entry + "}").encode()


# The header, how many bytes follow it, and what the message must say.
BROKEN: dict[str, tuple[bytes, int, str]] = {
    "not an object": (b"[]", 0, "must begin with '{'"),
    "space first": (b" {}", 0, "must begin with '{'"),
    "unended": (b'{"a":', 0, "an object"),
    "two objects": (b"{}{}", 0, "nothing but spaces"),
    "NUL after": (b"{}\0\0", 0, "nothing but spaces"),
    "no comma": (b'{"__metadata__":{}"a":{}}', 0, "','"),
    "trailing comma": (json.dumps(GOOD).encode()[:-1] + b",}", 24, "a name in quotes"),
    "not UTF-8": (b'{"\xff":{}}', 0, "UTF-8"),
    "overlong UTF-8": (b'{"\xc0\xaf":{}}', 0, "UTF-8"),
    "UTF-16": (json.dumps(GOOD).encode("utf-16-le"), 24, "a name in quotes"),
    "byte order mark": (b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), 24, "must begin with '{'"),
    "raw control": (b'{"a\nb":{}}', 0, "a name in quotes"),
    "lone surrogate": (b'{"\\ud800":{}}', 0, "escape"),
    "bad escape": (b'{"\\u12g4":{}}', 0, "escape"),
    "unknown escape": (b'{"\\x41":{}}', 0, "a name in quotes"),
    "empty name": (b'{"":{}}', 0, "printable"),
    "control in a name": (b'{"\\u001b[2J":{}}', 0, "printable"),
    "line break in a name": (b'{"a\\nb":{}}', 0, "printable"),
    "long name": (b'{"' + b"a" * 2000 + b'":{}}', 0, "printable"),
    "duplicate name": (b"{" + (json.dumps(GOOD)[1:-1] + "," + json.dumps(GOOD)[1:-1]).encode() + b"}", 48, "twice"),
    "duplicate by escape": (
        json.dumps(GOOD).encode()[:-1] + b"," + json.dumps(GOOD).encode()[1:].replace(b'"a"', b'"\\u0061"'),
        24,
        "twice",
    ),
    "duplicate field": (
        _raw('{"dtype":"F32","dtype":"F32","shape":[],"data_offsets":[0,4]}'),
        4,
        "dtype twice",
    ),
    "two shapes": (_raw('{"dtype":"F32","shape":[1],"shape":[1]}'), 4, "shape twice"),
    "two metadata": (b'{"__metadata__":{},"__metadata__":{}}', 0, "'__metadata__' occurs twice"),
    "duplicate metadata": (b'{"__metadata__":{"a":"1","a":"2"}}', 0, "metadata name 'a' occurs twice"),
    "metadata number": (b'{"__metadata__":{"a":1}}', 0, "metadata values are strings"),
    "metadata list": (b'{"__metadata__":[]}', 0, "metadata is an object"),
    "nested metadata": (b'{"__metadata__":{"a":{}}}', 0, "metadata values are strings"),
    "entry list": (b'{"a":[]}', 0, "'a' is an object"),
    "entry null": (b'{"a":null}', 0, "'a' is an object"),
    "no shape": (_raw('{"dtype":"F32","data_offsets":[0,4]}'), 4, "','"),
    "extra field": (_raw('{"dtype":"U8","shape":[1],"data_offsets":[0,1],"x":1}'), 1, "no more"),
    "unknown field": (_raw('{"kind":"U8","shape":[1],"data_offsets":[0,1]}'), 1, "dtype, shape or data_offsets"),
    "unknown dtype": (_entry(dtype="F33"), 24, "unknown dtype 'F33'"),
    "lower-case dtype": (_entry(dtype="f32"), 24, "dtype, shape or data_offsets"),
    "dtype number": (_entry(dtype=5), 24, "dtype, shape or data_offsets"),
    "dtype list": (_entry(dtype=[]), 24, "wrong kind"),
    "shape string": (_entry(shape="F32"), 24, "wrong kind"),
    "negative size": (_entry(shape=[-2, 3]), 24, "whole numbers from 0"),
    "fractional size": (_raw('{"dtype":"F32","shape":[2.0,3],"data_offsets":[0,24]}'), 24, "whole numbers"),
    "exponent size": (_raw('{"dtype":"F32","shape":[2e0,3],"data_offsets":[0,24]}'), 24, "whole numbers"),
    "NaN size": (_raw('{"dtype":"F32","shape":[NaN],"data_offsets":[0,24]}'), 24, "whole numbers"),
    "boolean size": (_entry(shape=[True]), 24, "whole numbers"),
    "null size": (_entry(shape=[None]), 24, "whole numbers"),
    "leading zero": (_raw('{"dtype":"F32","shape":[02,3],"data_offsets":[0,24]}'), 24, "whole numbers"),
    "no comma in shape": (_raw('{"dtype":"F32","shape":[2 3],"data_offsets":[0,24]}'), 24, "whole numbers"),
    "comma at the end of shape": (_raw('{"dtype":"F32","shape":[2,3,],"data_offsets":[0,24]}'), 24, "whole numbers"),
    "nested shape": (_entry(shape=[[2], 3]), 24, "whole numbers"),
    "a number of 5,000 digits": (_raw('{"dtype":"F32","shape":[' + "9" * 5000 + "]"), 24, "whole numbers"),
    "a size beyond 63 bits": (_entry(shape=[9999999999999999999]), 24, "more elements"),
    "an overflowing product": (_entry(shape=[1 << 32, 1 << 32]), 24, "more elements"),
    "a product that overflows to the right size": (_entry(shape=[6, 1 << 62, 4]), 24, "more elements"),
    "a product hidden by zero": (_entry(shape=[0, 1 << 62, 1 << 62], data_offsets=[0, 0]), 0, "more elements"),
    "65 dimensions": (_entry(shape=[1] * 65, data_offsets=[0, 4]), 4, "whole numbers"),
    "one offset": (_entry(data_offsets=[24]), 24, "a start and an end"),
    "three offsets": (_entry(data_offsets=[0, 24, 24]), 24, "a start and an end"),
    "reversed offsets": (_entry(data_offsets=[24, 0]), 24, "a start and an end"),
    "negative offset": (_entry(data_offsets=[-8, 16]), 24, "whole numbers"),
    "too few bytes": (_entry(data_offsets=[0, 20]), 20, "takes 24 bytes, not 20"),
    "too many bytes": (_entry(data_offsets=[0, 28]), 28, "takes 24 bytes, not 28"),
    "half a byte": (_entry(dtype="F4", shape=[3], data_offsets=[0, 1]), 1, "takes 2 bytes, not 1"),
    "file ends in a tensor": (_entry(), 23, "should end at byte"),
    "far offset": (_entry(data_offsets=[1 << 60, (1 << 60) + 24]), 24, "belong to no tensor"),
    "bytes after the last tensor": (_entry(), 25, "1 bytes after the last tensor"),
    "bytes before the first tensor": (_entry(data_offsets=[8, 32]), 32, "8 bytes before 'a'"),
    "overlap": (
        json.dumps({**GOOD, "b": {"dtype": "U8", "shape": [8], "data_offsets": [23, 31]}}).encode(),
        31,
        "'b' overlap those of 'a'",
    ),
    "the same bytes twice": (json.dumps({**GOOD, "b": GOOD["a"]}).encode(), 24, "overlap"),
    "hole": (
        json.dumps({**GOOD, "b": {"dtype": "U8", "shape": [1], "data_offsets": [25, 26]}}).encode(),
        26,
        "1 bytes before 'b'",
    ),
    "an empty tensor inside another": (
        json.dumps({**GOOD, "b": {"dtype": "U8", "shape": [0], "data_offsets": [12, 12]}}).encode(),
        24,
        "overlap",
    ),
    "deep nesting": (_raw("[" * 100_000), 0, "an object"),
    "deep objects": (b'{"a":' * 50_000, 0, "dtype"),
}


@pytest.mark.parametrize("case", list(BROKEN))
def test_each_broken_rule_is_named_with_its_byte(tmp_path: Path, case: str) -> None:
    header, data, words = BROKEN[case]
    path = _file(tmp_path / "x.safetensors", header, data)
    with pytest.raises(BitwrightError) as caught:
        read_index(path)
    error = caught.value
    assert error.code == "BW302" and error.exit_status == 3 and error.suggestion
    assert words in error.what and "x.safetensors" in error.what and str(path) in error.where
    byte = int(error.where.rsplit("byte ", 1)[1])
    assert 0 <= byte <= max(path.stat().st_size, 8 + len(header) + (1 << 60)) and len(str(error)) < 4000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it has 0 bytes"),
        (b"1234567", "it has 7 bytes"),
        (bytes(8), "header of 0 bytes"),
        (b"\x01" + bytes(7) + b"{", "header of 1 bytes"),
        (b"\x03" + bytes(7) + b"{}", "only 2 bytes follow"),
        (b"\xff" * 8 + b"{}", "at most"),
        ((MAX_HEADER + 1).to_bytes(8, "little") + b"{}", "at most"),
        ((1 << 63).to_bytes(8, "little") + b"{}", "at most"),
        (b"\x80\x04\x95" + bytes(40), "bytes long"),
        (b"PK\x03\x04" + bytes(60), "bytes long"),
    ],
)
def test_lengths_that_lie_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(BitwrightError, match="BW302") as caught:
        read_index(path)
    assert words in caught.value.what


def test_what_is_no_regular_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "directory").mkdir()
    for name, code in (("pipe", "BW302"), ("directory", "BW302"), ("absent", "BW303"), ("a\0b", "BW302")):
        with pytest.raises(BitwrightError) as caught:
            read_index(tmp_path / name)
        assert caught.value.code == code


NAMES = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S")), min_size=1, max_size=12)
WIDTHS = [(dtype, bits // 8) for dtype, bits in DTYPE_BITS.items() if bits % 8 == 0]


@st.composite
def headers(draw: st.DrawFn) -> tuple[str, int]:
    """A valid header, written with any spaces, orders and escapes, and how many bytes its tensors take."""
    names = draw(st.lists(NAMES.filter(lambda name: name != "__metadata__"), max_size=6, unique=True))
    metadata = draw(st.none() | st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=3))
    random = draw(st.randoms(use_true_random=False))
    ascii_only = random.random() < 0.5
    meaning: dict[str, Any] = {} if metadata is None else {"__metadata__": metadata}
    position = 0
    for name in names:
        dtype, width = random.choice(WIDTHS)
        shape = [random.randrange(5) for _ in range(random.randrange(4))]
        size = width * math.prod(shape)
        meaning[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + size]}
        position += size

    def space() -> str:
        return "".join(random.choice(" \t\n\r") for _ in range(random.randrange(3)))

    def write(value: Any) -> str:
        if isinstance(value, dict):
            items = random.sample(list(value.items()), len(value))
            parts = [space() + write(key) + space() + ":" + space() + write(item) + space() for key, item in items]
            return "{" + ",".join(parts) + "}"
        if isinstance(value, list):
            return "[" + ",".join(space() + str(item) + space() for item in value) + space() + "]"
        return json.dumps(value, ensure_ascii=ascii_only)

    return write(meaning) + space(), position


@given(headers())
@example(('{"a":{"dtype":"U8","shape":[ ],"data_offsets":[ 0 , 1 ]}}', 1))
def test_a_valid_header_means_what_json_says(tmp_path_factory: pytest.TempPathFactory, case: tuple[str, int]) -> None:
    text, size = case
    meaning = json.loads(text)
    path = _file(tmp_path_factory.getbasetemp() / "valid.safetensors", text.encode(), size)
    if not all(name.isprintable() for name in meaning):  # the one rule beyond the format's
        with pytest.raises(BitwrightError, match="printable"):
            read_index(path)
        return
    index = read_index(path)
    assert dict(index.metadata) == meaning.pop("__metadata__", {})
    base = 8 + len(text.encode())
    assert dict(index.tensors) == {
        name: TensorEntry(entry["dtype"], tuple(entry["shape"]), *(base + offset for offset in entry["data_offsets"]))
        for name, entry in meaning.items()
    }


@given(st.binary(max_size=300), st.integers(0, 400))
def test_any_bytes_at_all_give_an_index_or_our_error(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, length: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + content)
    codes = set()
    try:
        read_index(path)
    except BitwrightError as error:
        codes.add(error.code)
    assert codes <= {"BW302"}


@pytest.mark.parametrize(
    "names",
    [
        ["lists", "nests", "a value of escapes and one emoji"],
        pytest.param([], marks=pytest.mark.slow, id="all"),
    ],
    ids=lambda names: "some",
)
def test_the_largest_hostile_headers_take_bounded_memory(names: list[str]) -> None:
    """Headers as large as are read at all, made to cost as much as they can; in a process of its own, without torch."""
    command = [sys.executable, "-m", "tests.fuzz.hostile_headers", *names]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 200e6


def test_reading_an_index_opens_no_other_file(tmp_path: Path) -> None:
    """And closes the one it opened, whatever the outcome."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    path = _file(tmp_path / "x", b"{}", 1)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(before[0], 256), before[1]))
    try:
        for _ in range(300):
            with pytest.raises(BitwrightError):
                read_index(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_more_than_any_model_has_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = {name: {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for name in "ab"}
    metadata = {"__metadata__": {"a": "x" * 50, "b": ""}}
    path = _file(tmp_path / "x", json.dumps(two | metadata).encode(), 0)
    assert len(read_index(path).tensors) == 2
    for limit, words in (("MAX_TENSORS", "more than 1 tensors"), ("MAX_METADATA", "at most")):
        with monkeypatch.context() as patch:
            patch.setattr(safetensors_index, limit, 1 if limit == "MAX_TENSORS" else 40)
            with pytest.raises(BitwrightError, match=words):
                read_index(path)
    monkeypatch.setattr(safetensors_index, "MAX_TENSORS", 1)
    with pytest.raises(BitwrightError, match="metadata are at most 1 entries"):
        read_index(_file(tmp_path / "y", json.dumps(metadata).encode(), 0))


def test_a_file_that_cannot_be_read_or_shrinks_meanwhile_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _file(tmp_path / "x", b"{}", 0)
    pread = os.pread
    monkeypatch.setattr(
        os, "pread", lambda descriptor, count, offset: pread(descriptor, count, offset)[:8][: 8 - offset]
    )
    with pytest.raises(BitwrightError, match=r"BW302.*ends inside its header"):
        read_index(path)

    def refuse(descriptor: int, count: int, offset: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pread", refuse)
    with pytest.raises(BitwrightError, match=r"BW302.*Input/output error"):
        read_index(path)
