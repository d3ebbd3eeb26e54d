"""Seeded damage to safetensors files: to any bytes, to the length of the header, to its JSON as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from json.encoder import encode_basestring
from random import Random
from typing import Any

__all__ = ["MUTATIONS", "SEEDS", "build_file", "mutate"]

WIDTHS = {"F32": 4, "BF16": 2, "I64": 8, "U8": 1, "I32": 4, "F8_E4M3": 1, "BOOL": 1, "F16": 2, "F64": 8}


class Raw(str):
    """Text that is written into the JSON as it is."""

    __slots__ = ()


# A JSON object as pairs, so that a name can occur twice.
Pairs = list[tuple[str, Any]]


def build_file(pairs: Pairs, size: int, random: Random | None = None) -> bytes:
    header = _write(pairs).encode("utf-8", "surrogatepass")
    data = bytes(size) if random is None else random.randbytes(size)
    return len(header).to_bytes(8, "little") + header + data


def _write(value: Any) -> str:
    kind = type(value)
    if kind is list and value and type(value[0]) is tuple:
        return "{" + ",".join([f"{_write(key)}:{_write(item)}" for key, item in value]) + "}"
    if kind is list:
        return "[" + ",".join([_write(item) for item in value]) + "]"
    if kind is str:
        return encode_basestring(value)
    if kind is int:
        return str(value)
    return str(value) if kind is Raw else json.dumps(value)


def _layout(tensors: list[tuple[str, str, list[int]]], metadata: Pairs | None = None) -> tuple[Pairs, int]:
    pairs: Pairs = [] if metadata is None else [("__metadata__", metadata)]
    position = 0
    for name, dtype, shape in tensors:
        size = WIDTHS[dtype]
        for extent in shape:
            size *= extent
        offsets = [position, position + size]
        pairs.append((name, [("dtype", dtype), ("shape", shape), ("data_offsets", offsets)]))
        position += size
    return pairs, position


SEEDS: list[tuple[Pairs, int]] = [
    _layout([("a", "F32", [2, 3])]),
    _layout([("a", "F32", []), ("b", "U8", [0]), ("c", "BF16", [3, 1, 2])], [("format", "pt")]),
    _layout([("é \\ \"q\"", "I64", [2]), ("🙂", "BOOL", [5])], [("k", "v\n\\u"), ("", "")]),
    _layout([(f"model.layers.{n}.self_attn.q_proj.weight", "BF16", [8, 4]) for n in range(12)], [("format", "pt")]),
    _layout([(f"x.{n}", dtype, [n, 2]) for n, dtype in enumerate(WIDTHS)]),
]  # fmt: skip

TOKENS = [
    b"NaN", b"-Infinity", b"1e400", b"-1", b"0.5", b"00", b"null", b"true", b"{}", b"[]", b'"', b"\\", b"\\ud800",
    b"\0", b"\xff", b"\xc0\xaf", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"__metadata__":', b",", b":", b"]", b"}",
    b"9" * 25, b"9" * 5000, b"[" * 2000, b'{"a":' * 500, b" " * 300, b"\xf0\x9f\x99\x82", b"\x1b[2J",
]  # fmt: skip
NUMBERS = [
    -1, 0, 1, 7, 255, 1 << 31, (1 << 31) - 1, 1 << 32, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 10**30, 2.0, 0.5,
    -0.0, float("nan"), float("inf"), True, False, None, "4", [], [4], Raw("1e3"), Raw("04"), Raw("+4"), Raw("0x4"),
    Raw("9" * 4500), Raw("٣"),
]  # fmt: skip


def flip_bit(content: bytes, random: Random) -> bytes:
    if not content:
        return content
    data = bytearray(content)
    data[_place(random, len(data))] ^= 1 << random.randrange(8)
    return bytes(data)


def set_byte(content: bytes, random: Random) -> bytes:
    if not content:
        return content
    data = bytearray(content)
    data[_place(random, len(data))] = random.randrange(256)
    return bytes(data)


def insert_token(content: bytes, random: Random) -> bytes:
    place = _place(random, len(content) + 1)
    return content[:place] + random.choice(TOKENS) + content[place:]


def delete_slice(content: bytes, random: Random) -> bytes:
    start = _place(random, len(content) + 1)
    return content[:start] + content[start + random.randrange(1, 20) :]


def repeat_slice(content: bytes, random: Random) -> bytes:
    start = _place(random, len(content) + 1)
    end = start + random.randrange(1, 120)
    return content[:end] + content[start:]


def splice_files(content: bytes, random: Random) -> bytes:
    other = build_file(*random.choice(SEEDS))
    return content[: random.randrange(len(content) + 1)] + other[random.randrange(len(other)) :]


def truncate_file(content: bytes, random: Random) -> bytes:
    return content[: random.choice([_place(random, len(content) + 1), max(0, len(content) - random.randrange(1, 9))])]


def extend_file(content: bytes, random: Random) -> bytes:
    return content + random.randbytes(random.randrange(1, 40))


def lie_about_length(content: bytes, random: Random) -> bytes:
    length = int.from_bytes(content[:8], "little")
    size = len(content)
    lies = [0, 1, 2, length - 1, length + 1, size - 8, size - 7, size, 32 << 20, (32 << 20) + 1, 100_000_000]
    lie = random.choice([*lies, 1 << 31, 1 << 63, (1 << 64) - 1, random.randrange(1 << 64), random.randrange(size + 9)])
    return (lie % (1 << 64)).to_bytes(8, "little") + content[8:]


def _change_json(content: bytes, random: Random, change: Callable[[Pairs, Random], Pairs]) -> bytes:
    """Damage a fresh header as JSON, its length and data still right: only the one rule is broken."""
    pairs, size = random.choice(SEEDS)
    damaged = change(list(pairs), random)
    if random.random() < 0.2:
        random.shuffle(damaged)
    return build_file(damaged, max(0, size + random.choice([0, 0, 0, -1, 1])), random)


def _change_entry(pairs: Pairs, random: Random, change: Callable[[Pairs], Any]) -> Pairs:
    place = random.randrange(len(pairs))
    name, entry = pairs[place]
    pairs[place] = (name, change(list(entry)))
    return pairs


def duplicate_name(content: bytes, random: Random) -> bytes:
    return _change_json(content, random, lambda pairs, random: [*pairs, random.choice(pairs)])


def rename_tensor(content: bytes, random: Random) -> bytes:
    names = [
        "",
        "__metadata__",
        "a\nb",
        "\ud800",
        "x" * 300,
        "\u202e",
        "\x7f",
        "a",
        Raw('"\\u0061"'),
        Raw('"\\u00"'),
        Raw("5"),
    ]

    def change(pairs: Pairs, random: Random) -> Pairs:
        place = random.randrange(len(pairs))
        pairs[place] = (random.choice(names), pairs[place][1])
        return pairs

    return _change_json(content, random, change)


def change_number(content: bytes, random: Random) -> bytes:
    """A size or an offset becomes another number, or none."""

    def change(entry: Pairs) -> Pairs:
        numbers = [place for place, (_, value) in enumerate(entry) if isinstance(value, list) and value]
        if not numbers:
            return entry
        place = random.choice(numbers)
        name, value = entry[place]
        value = list(value)
        value[random.randrange(len(value))] = random.choice([*NUMBERS, random.randrange(64)])
        entry[place] = (name, value)
        return entry

    return _change_json(content, random, lambda pairs, random: _change_entry(pairs, random, change))


def change_field(content: bytes, random: Random) -> bytes:
    """A field is lost, doubled, renamed, or given another value."""
    values: list[Any] = [
        *NUMBERS,
        "F33",
        "f32",
        "F4",
        "F6_E2M3",
        [1] * 65,
        [1 << 32, 1 << 32],
        [0, 1 << 62, 8],
        [-2, -3],
    ]
    names = ["dtype", "shape", "data_offsets", "Shape", "", "x"]

    def change(entry: Pairs) -> Pairs:
        kind, place = random.randrange(4), random.randrange(len(entry))
        if kind == 0:
            del entry[place]
        elif kind == 1:
            entry.append(random.choice(entry))
        elif kind == 2:
            entry[place] = (random.choice(names), entry[place][1])
        else:
            entry[place] = (entry[place][0], random.choice(values))
        return entry

    return _change_json(content, random, lambda pairs, random: _change_entry(pairs, random, change))


def change_value(content: bytes, random: Random) -> bytes:
    """A whole entry, or a value of the metadata, becomes something else; or deeply nested."""
    depth = random.choice([3, 50, 5000])
    values = [*NUMBERS, [], "F32", Raw("{}"), Raw("[" * depth + "]" * depth), Raw('{"a":' * depth + "1" + "}" * depth)]

    def change(pairs: Pairs, random: Random) -> Pairs:
        place = random.randrange(len(pairs))
        pairs[place] = (pairs[place][0], random.choice(values))
        return pairs

    return _change_json(content, random, change)


def move_tensor(content: bytes, random: Random) -> bytes:
    """The bytes of a tensor move a little: they overlap others, leave a gap, or pass the end."""

    def change(entry: Pairs) -> Pairs:
        shift = random.choice([-8, -1, 1, 4, 100, 1 << 40])
        return [
            (name, [offset + shift for offset in value] if name == "data_offsets" else value) for name, value in entry
        ]

    return _change_json(content, random, lambda pairs, random: _change_entry(pairs, random, change))


def keep_file(content: bytes, random: Random) -> bytes:
    return content


MUTATIONS: tuple[Callable[[bytes, Random], bytes], ...] = (
    flip_bit, set_byte, insert_token, delete_slice, repeat_slice, splice_files, truncate_file, extend_file,
    lie_about_length, duplicate_name, rename_tensor, change_number, change_field, change_value, move_tensor, keep_file,
)  # fmt: skip


def mutate(random: Random) -> bytes:
    """A valid file, damaged once to three times."""
    content = build_file(*random.choice(SEEDS), random)
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        content = random.choice(MUTATIONS)(content, random)
    if random.random() < 0.5 and len(content) > 8:  # half of the time the length is set right again, to get further in
        length = int.from_bytes(content[:8], "little")
        end = content.rfind(b"}") + 1
        if end > 8 and length != end - 8 and random.random() < 0.5:
            content = (end - 8).to_bytes(8, "little") + content[8:]
    return content


def _place(random: Random, size: int) -> int:
    """Anywhere, but rather near the front, where the header is."""
    return random.randrange(min(size, 300)) if random.random() < 0.7 else random.randrange(size)
