"""Tensors written and read: the bytes of the reference implementation, streamed, exact for every dtype."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.formats.safetensors_file import CHUNK, DTYPES, open_source, read_tensor, serialize
from bitwright.formats.safetensors_index import DTYPE_BITS, TensorEntry, read_index
from bitwright.formats.storage import write_file

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(), (1,), (3,), (2, 3), (0,), (4, 0, 2), (1, 1), (2, 1, 3), (5, 7)]


def _tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """Any bytes at all, so NaNs with payloads and unusual zeros too (but no bool other than 0 and 1)."""
    count = dtype.itemsize * torch.Size(shape).numel()
    limit = 2 if dtype == torch.bool else 256
    generator = torch.Generator().manual_seed(seed)
    data = torch.randint(0, limit, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).reshape(shape)


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _write(path: Path, tensors: dict[str, Tensor]) -> Path:
    write_file(path, serialize(tensors))
    return path


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = {
        f"{name}.{number}": _tensor(dtype, shape, number)
        for name, dtype in DTYPES.items()
        for number, shape in enumerate(SHAPES)
    }
    path = _write(tmp_path / "x.safetensors", tensors)
    index = read_index(path)
    assert set(index.tensors) == set(tensors) and index.metadata == {"format": "pt"}
    for name, tensor in tensors.items():
        entry = index.tensors[name]
        read = read_tensor(path, entry)
        assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
        assert _bytes(read) == _bytes(tensor)
        source = open_source(path, entry)
        assert (source.dtype, source.shape) == (tensor.dtype, tuple(tensor.shape))
        assert b"".join(source.chunks()) == _bytes(tensor)
        assert entry.start % tensor.dtype.itemsize == 0, "a tensor lies where its dtype is aligned"


def test_the_bytes_are_those_of_the_reference_implementation() -> None:
    reference = pytest.importorskip("safetensors.torch")
    known = [dtype for dtype in DTYPES.values() if "fnuz" not in str(dtype)]
    tensors = {
        f'{"zyx"[n % 3]}.{n} ü"\\': _tensor(dtype, shape, n) for n, dtype in enumerate(known) for shape in SHAPES
    }
    assert b"".join(serialize(tensors)) == reference.save(tensors, {"format": "pt"})
    assert b"".join(serialize({}, {})) == reference.save({})
    assert b"".join(serialize(dict(reversed(tensors.items())))) == b"".join(serialize(tensors))


@given(st.dictionaries(st.text("ab.é_0", min_size=1, max_size=6), st.sampled_from(list(DTYPES)), max_size=6))
def test_files_written_in_any_order_are_equal(names: dict[str, str]) -> None:
    tensors = {name: _tensor(DTYPES[dtype], (3,), len(name)) for name, dtype in names.items()}
    assert b"".join(serialize(tensors)) == b"".join(serialize(dict(sorted(tensors.items(), reverse=True))))


def test_the_reference_implementation_reads_what_we_write(tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 4).bfloat16(), "b": torch.randn(5).to(torch.float8_e4m3fn), "c": torch.arange(3)}
    loaded = reference.load_file(_write(tmp_path / "x", tensors))
    assert all(_bytes(loaded[name]) == _bytes(tensor) for name, tensor in tensors.items())


def test_we_read_what_the_reference_implementation_writes(tmp_path: Path) -> None:
    reference = pytest.importorskip("safetensors.torch")
    tensors = {"a": torch.randn(3, 4).bfloat16(), "empty": torch.zeros(0, 3), "c": torch.tensor(2.5)}
    reference.save_file(tensors, tmp_path / "x", {"k": "v"})
    index = read_index(tmp_path / "x")
    assert index.metadata == {"k": "v"}
    for name, entry in index.tensors.items():
        assert torch.equal(read_tensor(tmp_path / "x", entry), tensors[name])


def test_tensors_that_are_not_contiguous_are_written_as_they_read() -> None:
    base = torch.arange(24, dtype=torch.int32).reshape(4, 6)
    views = {"a": base.t(), "b": base[:, 1::2], "c": base[:1].t()[:1], "d": base[0, 0], "e": base.expand(2, 4, 6)}
    copies = {name: view.clone(memory_format=torch.contiguous_format) for name, view in views.items()}
    assert b"".join(serialize(views)) == b"".join(serialize(copies))


def test_what_is_written_is_the_memory_of_the_tensors_themselves() -> None:
    """No copy: a view of a tensor that is changed later shows the change."""
    tensor = torch.zeros(8, dtype=torch.bfloat16)
    _, view = serialize({"a": tensor})
    assert isinstance(view, memoryview)
    tensor.fill_(1.0)
    assert bytes(view) == _bytes(tensor)


@dataclass(frozen=True)
class Made:
    """A tensor that is made while it is written."""

    dtype: torch.dtype = torch.float32
    shape: tuple[int, ...] = (4, 2)

    def chunks(self) -> Iterator[bytes | memoryview]:
        for number in range(4):
            yield memoryview(torch.full((2,), float(number)).numpy().view("uint8").data)


def test_sources_are_streamed_between_tensors(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_file(path, serialize({"b": Made(), "a": torch.ones(3)}))
    index = read_index(path)
    assert read_tensor(path, index.tensors["b"]).tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]
    second = tmp_path / "y"
    write_file(second, serialize({name: open_source(path, entry) for name, entry in index.tensors.items()}))
    assert second.read_bytes() == path.read_bytes()


def test_large_tensors_come_in_chunks(tmp_path: Path) -> None:
    tensor = _tensor(torch.uint8, (2 * CHUNK + 5,))
    path = _write(tmp_path / "x", {"a": tensor})
    entry = read_index(path).tensors["a"]
    assert [len(chunk) for chunk in open_source(path, entry).chunks()] == [CHUNK, CHUNK, 5]
    assert torch.equal(read_tensor(path, entry), tensor)


def test_what_the_format_or_torch_does_not_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BitwrightError, match="BW304"):
        list(serialize({"a": torch.zeros(2, dtype=torch.complex128)}))
    entry = TensorEntry("F4", (2,), 0, 1)
    with pytest.raises(BitwrightError, match="BW304"):
        open_source(tmp_path / "x", entry)
    with pytest.raises(BitwrightError, match="BW304"):
        read_tensor(tmp_path / "x", entry)
    assert set(DTYPES) <= set(DTYPE_BITS)
    assert all(dtype.itemsize * 8 == DTYPE_BITS[name] for name, dtype in DTYPES.items())


def test_a_file_that_shrinks_or_goes_after_it_was_opened_is_named(tmp_path: Path) -> None:
    path = _write(tmp_path / "x.safetensors", {"a": torch.zeros(100)})
    entry = read_index(path).tensors["a"]
    source = open_source(path, entry)
    path.write_bytes(path.read_bytes()[:-8])
    for read in (lambda: read_tensor(path, entry), lambda: list(source.chunks())):
        with pytest.raises(BitwrightError, match=r"(?s)BW302.*x\.safetensors has \d+ bytes.*changed"):
            read()
    path.unlink()
    for read in (lambda: read_tensor(path, entry), lambda: list(source.chunks())):
        with pytest.raises(BitwrightError, match=r"BW303.*x\.safetensors"):
            read()
    path.mkdir()
    for read in (lambda: read_tensor(path, entry), lambda: list(source.chunks())):
        with pytest.raises(BitwrightError, match=r"BW302.*x\.safetensors"):
            read()


STREAM = """
import sys
from pathlib import Path
from bitwright.formats.safetensors_file import open_source, serialize
from bitwright.formats.safetensors_index import read_index
from bitwright.formats.storage import write_file
from tests.fuzz.memory import peak_bytes

path = Path(sys.argv[1])
index = read_index(path)
before = peak_bytes()
sources = {name: open_source(path, entry) for name, entry in index.tensors.items()}
write_file(path.with_name("copy"), serialize(sources))
print(peak_bytes() - before)
"""


def test_copying_a_file_takes_the_memory_of_a_chunk_or_two(tmp_path: Path) -> None:
    path = _write(tmp_path / "x", {f"a{n}": torch.zeros(CHUNK, dtype=torch.uint8) for n in range(5)})
    command = [sys.executable, "-c", STREAM, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 3 * CHUNK
    assert (tmp_path / "copy").stat().st_size == path.stat().st_size > 5 * CHUNK
