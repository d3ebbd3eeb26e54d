"""Mutated safetensors files through the reader: only an index that holds, or our own error.

From the root of the repository: ``python -m tests.fuzz.fuzz_safetensors --count 200000``. Prints one line of JSON: how
many files, how many of them were valid after all, how many rules the others broke, the seconds, and the peak of the
resident memory. Any other exception, a message without measure, or an index that points outside the file ends the run,
with the seed of the file.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

from bitwright.core.errors import BitwrightError
from bitwright.formats.safetensors_index import DTYPE_BITS, FileIndex, read_index
from tests.fuzz.memory import peak_bytes
from tests.fuzz.mutations import mutate

__all__ = ["fuzz", "read_mutation"]

# What is particular to one file, taken out of the rule that it broke.
RULE = re.compile(r"(\b\w+ )?'(\\.|[^'\\])*'|\"[^\"]*\"|\b(BOOL|[A-Z]+\d\w*) \[[^]]*\]|-?\d+| \(at byte .*")


def read_mutation(path: Path, seed: int) -> str:
    """Write the file of this seed, read it; "valid", or the rule that it broke.

    Raises:
        AssertionError: if the index or the error is not as promised; anything else that the reader lets escape.
    """
    content = mutate(Random(seed))
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.write(descriptor, content)
    finally:
        os.close(descriptor)
    refusal = None
    try:
        index = read_index(path)
    except BitwrightError as error:
        refusal = error
    if refusal is None:
        _check_index(index, content)
        return "valid"
    message = str(refusal)
    assert refusal.code == "BW302" and len(message) < 3000 and message.replace("\n", "").isprintable(), message
    assert path.name in message and refusal.suggestion
    return RULE.sub("…", refusal.what.split(": ", 1)[1])


def _check_index(index: FileIndex, content: bytes) -> None:
    """What was accepted is what JSON says, its tensors fill the file, and their bytes can be read."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    assert index.metadata == header.pop("__metadata__", {}) and set(index.tensors) == set(header)
    position = 8 + length
    with index.path.open("rb") as file:
        for name, entry in sorted(index.tensors.items(), key=lambda item: (item[1].start, item[1].end)):
            wanted = header[name]
            assert [entry.dtype, list(entry.shape)] == [wanted["dtype"], wanted["shape"]]
            assert entry.start == position == 8 + length + wanted["data_offsets"][0] and entry.end >= entry.start
            bits = DTYPE_BITS[entry.dtype]
            for extent in entry.shape:
                bits *= extent
            assert bits == entry.nbytes * 8
            file.seek(entry.start)
            assert file.read(entry.nbytes) == content[entry.start : entry.end]
            position = entry.end
    assert position == len(content) == index.size


def fuzz(count: int, seed: int) -> Counter[str]:
    """Read ``count`` files; how many broke which rule."""
    found: Counter[str] = Counter()
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if os.access(shared, os.W_OK) else None) as folder:
        path = Path(folder) / "model.safetensors"
        for number in range(seed, seed + count):
            try:
                found[read_mutation(path, number)] += 1
            except BaseException:
                print(f"seed {number}", file=sys.stderr)
                raise
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Fuzz the safetensors reader.")
    parser.add_argument("--count", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rules", action="store_true", help="list how often each rule was broken")
    arguments = parser.parse_args()
    start = time.perf_counter()
    found = fuzz(arguments.count, arguments.seed)
    assert not {"torch", "numpy"} & set(sys.modules), "the reader must not need torch"
    result = {
        "files": found.total(),
        "valid": found["valid"],
        "rules": len(found) - 1,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_bytes": peak_bytes(),
    }
    print(json.dumps(result | ({"found": dict(found.most_common())} if arguments.rules else {})))


if __name__ == "__main__":
    main()
