"""Headers as large as are read at all, made to cost as much memory as they can.

Prints the peak of the resident memory. The tests run it in a process of its own, from the root of the repository:
``python -m tests.fuzz.hostile_headers [NAME ...]``.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from pathlib import Path

from bitwright.core.errors import BitwrightError
from bitwright.formats.safetensors_index import MAX_HEADER, MAX_METADATA, parse_header
from tests.fuzz.memory import peak_bytes

EMOJI = "\U0001f642".encode()
VALID = "a value of escapes and one emoji"


def repeat(start: bytes, item: bytes, end: bytes = b"", size: int = MAX_HEADER) -> bytes:
    """As many items, numbered where they hold ``#``, as fit; joined in one buffer, so that making them costs little."""
    out, number = io.BytesIO(), 0
    out.write(start)
    while out.tell() < size - 600:
        out.write(item.replace(b"#", b"%d" % number) if b"#" in item else item * 20)
        number += 1
    out.write(end)
    return out.getvalue()


MADE: dict[str, Callable[[], bytes]] = {
    "lists": lambda: repeat(b'{"a":{"shape":[', b"0,"),
    "nests": lambda: repeat(b'{"a":', b"["),
    "objects": lambda: repeat(b'{"a":{', b'"a":{'),
    "digits": lambda: repeat(b'{"a":{"shape":[', b"9"),
    "spaces": lambda: repeat(b"{", b" "),
    "a name of emoji": lambda: repeat(b'{"', EMOJI, b'":{}}'),
    "a value of emoji": lambda: repeat(b'{"__metadata__":{"a":"', EMOJI, b'"}}'),
    VALID: lambda: repeat(b'{"__metadata__":{"a":"' + EMOJI, b"aaaaaaaaaaaaaaaa\\n", b'"}}', MAX_METADATA),
    "long names": lambda: repeat(
        b"{", b'"' + EMOJI + b"a" * 240 + b'#":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', b"}"
    ),
    "metadata": lambda: repeat(b'{"__metadata__":{', b'"#":"",', b"}}"),
    "tensors": lambda: repeat(b"{", b'"#":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},', b"}"),
    "dimensions": lambda: repeat(
        b"{", b'"#":{"dtype":"U8","shape":[0' + b",99" * 8 + b'],"data_offsets":[9000000000,9000000000]},', b"}"
    ),
}


def main(names: list[str]) -> None:
    for name in names or MADE:
        header = MADE[name]()
        assert len(header) <= MAX_HEADER, (name, len(header))
        try:
            parse_header(header, 8 + len(header), Path("x"))
            refusal = ""
        except BitwrightError as error:
            refusal = str(error)
        assert (name == VALID) == (refusal == "") and len(refusal) < 4000, (name, refusal)
        del header
    assert "torch" not in sys.modules and "numpy" not in sys.modules
    print(peak_bytes())


if __name__ == "__main__":
    main(sys.argv[1:])
