"""Packed weights in files: the same decoder, only from files that are what they should be, whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from bitwright import Engine
from bitwright.core.errors import ArgumentError, Notice
from bitwright.core.scheme import LayerScheme
from bitwright.core.scheme_names import parse
from bitwright.engine.resources import packed_folder
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.kernels import native_library
from bitwright.models.decoder_native import NativeDecoder
from bitwright.models.decoder_weights import DecoderWeights
from bitwright.models.direct_loading import open_direct
from bitwright.models.loading import load
from bitwright.models.packed_files import identify, load_packed, packed_bytes, packed_path, save_packed
from bitwright.quantization.api import quantize
from tests.models.architectures import build
from tests.models.test_native_loading import logits

pytestmark = pytest.mark.skipif(native_library.missing() is not None, reason="the native kernels are not built")


def checkpoint(directory: Path, scheme: str | None, **fields: Any) -> Path:
    build("qwen2", **fields).save_pretrained(directory / "float")
    if scheme is None:
        return directory / "float"
    quantize(directory / "float", directory / scheme, scheme=scheme, algorithm="rtn")
    return directory / scheme


def pack(directory: Path, head: LayerScheme | None = None, kept: Path | None = None) -> DecoderWeights:
    direct = open_direct(directory)
    assert direct is not None
    return direct.pack(head, kept)


@pytest.mark.parametrize(("scheme", "head", "tied"), [
    (None, None, True), (None, "w8", True), (None, None, False), ("w4g32", "w8", False), ("w8a8", None, True),
    ("nf4g32", "w4g32", True), ("w4g32-asym", None, False), ("w3g32-asym-fz", "w8a8", False),
    ("w4g32-a8g32", "w8-a8g64", False), ("w4g32-dq(w8g256-sf32)", None, True),
])  # fmt: skip
def test_the_second_start_is_the_first(tmp_path: Path, scheme: str | None, head: str | None, tied: bool) -> None:
    directory, own = checkpoint(tmp_path, scheme, tied=tied), None if head is None else parse(head)
    expected = logits(NativeDecoder(load(directory), head=own))
    with pytest.warns(Notice, match=r"kept for the next start, \d+ MB"):
        first = pack(directory, own, tmp_path / "kept")
    (path,) = (tmp_path / "kept").iterdir()
    second = load_packed(path, identify(open_checkpoint(directory), None if own is None else own.name))
    assert second is not None and second.bytes() == first.bytes()
    for weights in (first, second, pack(directory, own, tmp_path / "kept")):
        assert torch.equal(logits(NativeDecoder(weights)), expected)
    assert second.shape.windows == first.shape.windows and second.dtype == first.dtype
    assert torch.equal(second.shape.inverse_frequencies, first.shape.inverse_frequencies)


def test_input_scales_that_are_shared_stay_so(tmp_path: Path) -> None:
    weights = pack(checkpoint(tmp_path, "w8a8"))
    scale = torch.rand(64) + 0.5
    block = weights.blocks[0]
    for name in ("query", "key", "value"):
        object.__setattr__(getattr(block, name), "input_scale", scale)
    save_packed(weights, tmp_path / "x.packed", {})
    again = load_packed(tmp_path / "x.packed", {})
    assert again is not None
    first = again.blocks[0]
    assert first.query.input_scale is first.key.input_scale is first.value.input_scale is not None
    assert torch.equal(logits(NativeDecoder(again)), logits(NativeDecoder(weights)))


def test_whatever_the_weights_depend_on_makes_them_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = checkpoint(tmp_path, None)
    identity = identify(open_checkpoint(directory), None)
    path = packed_path(tmp_path / "kept", identity)
    save_packed(pack(directory), path, identity)
    assert load_packed(path, identity) is not None
    for field in identity:
        assert load_packed(path, identity | {field: "another"}) is None, field
    file = directory / "model.safetensors"
    status = file.stat()
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    changed = identify(open_checkpoint(directory), None)
    assert changed != identity and packed_path(tmp_path / "kept", changed) == path  # and so it is replaced
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert identify(open_checkpoint(directory), None)["config"] != identity["config"]
    assert packed_path(tmp_path, identity | {"head": "w8"}) != packed_path(tmp_path, identity)


def test_files_that_are_not_whole_are_not_used(tmp_path: Path) -> None:
    path, identity = tmp_path / "x.packed", {"layout": 1}
    save_packed(pack(checkpoint(tmp_path, "w4g32")), path, identity)
    content = path.read_bytes()
    assert load_packed(path, identity) is not None
    length = 48 + int.from_bytes(content[8:16], "little")
    assert length % 4096 == 0
    for bad in (b"", content[:20], content[:length], content[:-1], content + b"\0", b"X" + content[1:]):
        path.write_bytes(bad)
        assert load_packed(path, identity) is None
    for position in range(8, length, 97):
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        assert load_packed(path, identity) is None, position
    path.unlink()
    assert load_packed(path, identity) is None


def test_an_index_that_leads_out_of_a_layer_is_found(tmp_path: Path) -> None:
    path = tmp_path / "x.packed"
    weights = pack(checkpoint(tmp_path, "w4g32"))
    tensors: Any = weights.blocks[1].down.weight.tensors  # type: ignore[union-attr]
    for column, is_sound in ((127, True), (128, False), (-1, True), (-2, False)):
        tensors["order"] = torch.full((128,), column, dtype=torch.int32)
        save_packed(weights, path, {})
        assert (load_packed(path, {}) is not None) == is_sound


def test_many_write_at_once(tmp_path: Path) -> None:
    """In every moment there is no file, or a whole one."""
    directory = checkpoint(tmp_path, None)
    weights, path = pack(directory), tmp_path / "kept" / "x.packed"
    program = (
        "import sys, torch; from pathlib import Path; from bitwright.models.direct_loading import open_direct;"
        "from bitwright.models.packed_files import save_packed;"
        "weights = open_direct(Path(sys.argv[1])).pack(None);"
        "[save_packed(weights, Path(sys.argv[2]), {}) for _ in range(8)]"
    )
    command = [sys.executable, "-c", program, str(directory), str(path)]
    writers = [subprocess.Popen(command) for _ in range(2)]
    seen, done = [], threading.Event()

    def read() -> None:
        while not done.is_set():
            if path.exists():
                seen.append(load_packed(path, {}) is not None)

    reader = threading.Thread(target=read)
    reader.start()
    assert [writer.wait(60) for writer in writers] == [0, 0]
    done.set()
    reader.join()
    assert seen and all(seen)
    assert [file.name for file in path.parent.iterdir()] == ["x.packed"]
    again = load_packed(path, {})
    assert again is not None and torch.equal(logits(NativeDecoder(again)), logits(NativeDecoder(weights)))


def test_what_killed_writers_leave_is_removed_in_time(tmp_path: Path) -> None:
    x, y = "0123456789abcdef" * 2, "f" * 32
    weights, path = pack(checkpoint(tmp_path, None)), tmp_path / "kept" / f"{x}.packed"
    path.parent.mkdir()
    names = (f"{x}.123.part", f".{x}.123.part.tmp", f"{y}.123.part", f"{x}.124.part", "own.123.part")
    for name in names:
        (path.parent / name).write_bytes(b"half")
        if name != names[3]:
            os.utime(path.parent / name, (1, 1))
    save_packed(weights, path, {})
    assert {file.name for file in path.parent.iterdir()} == {names[3], names[4], path.name}


def test_packed_weights_stay_within_the_limit_but_for_those_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three heads of one model are three files, and there is room for two."""
    directory, kept = checkpoint(tmp_path, None), tmp_path / "kept"
    kept.mkdir()
    (kept / "own.packed").write_bytes(b"not ours")
    heads = {name: None if name == "none" else parse(name) for name in ("none", "w8", "w4g32")}
    paths = {
        name: packed_path(kept, identify(open_checkpoint(directory), head and name)) for name, head in heads.items()
    }
    weights = pack(directory)
    size = save_packed(weights, tmp_path / "x.packed", {})
    assert 0 <= size - packed_bytes(weights) <= 8192
    for age, name in enumerate(("none", "w8")):
        with pytest.warns(Notice, match="next start") as said:
            pack(directory, heads[name], kept)
        assert "removed" not in str(said[0].message)
        os.utime(paths[name], (1000 + age, 1000 + age))
    pack(directory, heads["none"], kept)  # a start that maps it: the other one is older now
    both = sum(paths[name].stat().st_size for name in ("none", "w8"))
    monkeypatch.setenv("BITWRIGHT_CACHE_LIMIT", str(both / 2**30))
    with pytest.warns(Notice, match=r"1 that were used before are removed.*BITWRIGHT_CACHE_LIMIT"):
        pack(directory, heads["w4g32"], kept)
    assert {name for name, path in paths.items() if path.exists()} == {"none", "w4g32"}
    monkeypatch.setenv("BITWRIGHT_CACHE_LIMIT", "0")
    with pytest.warns(Notice, match="2 that were used before are removed"):
        pack(directory, heads["w8"], kept)
    assert {name for name, path in paths.items() if path.exists()} == {"w8"}
    assert (kept / "own.packed").exists()
    monkeypatch.setenv("BITWRIGHT_CACHE_LIMIT", "-1")
    with pytest.raises(ArgumentError, match="BITWRIGHT_CACHE_LIMIT"):
        pack(directory, None, kept)


def test_a_full_disk_is_told_and_the_engine_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = checkpoint(tmp_path, None)
    expected = logits(NativeDecoder(load(directory)))

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.warns(Notice, match=r"not kept: .*No space left"):
        weights = pack(directory, None, tmp_path / "kept")
    assert torch.equal(logits(NativeDecoder(weights)), expected)
    assert list((tmp_path / "kept").iterdir()) == []


def test_a_cache_that_cannot_be_written_is_told_and_done_without(tmp_path: Path) -> None:
    directory = checkpoint(tmp_path, None)
    (tmp_path / "file").write_text("in the way")
    with pytest.warns(Notice, match="not kept"):
        pack(directory, None, tmp_path / "file")


def test_the_engine_keeps_weights_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path / "cache"))
    with Engine("demo:") as engine:
        expected = engine.generate(["Once upon a time"], max_tokens=20)[0].tokens
    assert not (tmp_path / "cache").exists()
    with pytest.warns(Notice, match="next start"), Engine("demo:", packed_cache=True) as engine:
        assert engine.generate(["Once upon a time"], max_tokens=20)[0].tokens == expected
    assert len(list((tmp_path / "cache" / "packed").iterdir())) == 1
    with Engine("demo:", packed_cache=True) as engine:
        assert engine.generate(["Once upon a time"], max_tokens=20)[0].tokens == expected
    with pytest.warns(Notice, match="packed_cache has no effect"):
        Engine("demo:", packed_cache=tmp_path, decoder="torch").close()
    assert packed_folder(str(tmp_path)) == tmp_path
    for wrong in ("", 3):
        with pytest.raises(ArgumentError, match=r"BW201.*packed_cache"):
            Engine("demo:", packed_cache=wrong)  # type: ignore[arg-type]
