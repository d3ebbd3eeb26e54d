"""Opening model directories: what is there is found, what is wrong is named with its code and a next step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bitwright.core.errors import BitwrightError
from bitwright.formats import checkpoint
from bitwright.formats.checkpoint import INDEX, Checkpoint, open_checkpoint
from bitwright.formats.safetensors_file import serialize
from bitwright.formats.storage import write_file

A, B = torch.arange(6.0).reshape(2, 3), torch.ones(4, dtype=torch.bfloat16)
SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


def _single(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    write_file(directory / "model.safetensors", serialize({"a": A, "b": B}, {"format": "pt", "x": "y"}))
    return directory


def _sharded(directory: Path) -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "llama"}')
    write_file(directory / SHARDS[0], serialize({"a": A}))
    write_file(directory / SHARDS[1], serialize({"b": B}))
    _write_index(directory, {"a": SHARDS[0], "b": SHARDS[1]})
    return directory


def _write_index(directory: Path, weight_map: object) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {"total_size": 32}, "weight_map": weight_map}))


def _check(opened: Checkpoint) -> None:
    assert set(opened.tensors) == {"a", "b"} and opened.config == {"model_type": "llama"}
    assert torch.equal(opened.read("a"), A) and torch.equal(opened.read("b"), B)
    assert b"".join(opened.source("a").chunks()) == A.numpy().tobytes()
    sizes = {path.name: path.stat().st_size for path in opened.directory.glob("*.safetensors")}
    assert dict(opened.files) == sizes and opened.quantization is None


def test_one_file_or_shards_with_or_without_an_index_are_read(tmp_path: Path) -> None:
    single = open_checkpoint(_single(tmp_path / "single"))
    _check(single)
    assert single.metadata == {"format": "pt", "x": "y"}
    _check(open_checkpoint(_sharded(tmp_path / "sharded")))
    (tmp_path / "sharded" / INDEX).unlink()
    _check(open_checkpoint(tmp_path / "sharded"))


def test_a_single_file_is_preferred_to_an_index_as_transformers_does(tmp_path: Path) -> None:
    _single(_sharded(tmp_path / "x"))
    assert list(open_checkpoint(tmp_path / "x").files) == ["model.safetensors"]


def test_pickles_beside_safetensors_are_not_touched(tmp_path: Path) -> None:
    (_single(tmp_path / "x") / "pytorch_model.bin").write_bytes(b"\x80\x04cposix\nsystem\n")
    _check(open_checkpoint(tmp_path / "x"))


def _refusal(directory: Path, code: str) -> str:
    with pytest.raises(BitwrightError) as caught:
        open_checkpoint(directory)
    error = caught.value
    assert error.code == code and error.exit_status == 3, str(error)
    assert error.suggestion and (error.where or str(directory) in error.what)
    return str(error)


def test_what_is_no_model_is_said_to_be_none(tmp_path: Path) -> None:
    assert "No such file" in _refusal(tmp_path / "absent", "BW301")
    (tmp_path / "file").write_bytes(b"")
    assert "Not a directory" in _refusal(tmp_path / "file", "BW301")
    _refusal(tmp_path / "a\0b", "BW301")
    (tmp_path / "empty").mkdir()
    assert "config.json" in _refusal(tmp_path / "empty", "BW301")
    (tmp_path / "empty" / "config.json").write_text("{}")
    assert "model.safetensors" in _refusal(tmp_path / "empty", "BW301")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "last.ckpt", "a.pkl"])
def test_pickles_alone_are_refused_with_the_way_to_convert_them(tmp_path: Path, name: str) -> None:
    """Case W39: the pickle is not opened, so nothing in it runs."""
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch " + str(tmp_path / "pwned").encode() + b"'\ntR.")
    message = _refusal(tmp_path, "BW305")
    assert name in message and "safe_serialization=True" in message
    assert not (tmp_path / "pwned").exists()


def test_an_index_that_names_pickles_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model-1.bin").write_bytes(b"")
    _write_index(tmp_path, {"a": "pytorch_model-1.bin"})
    _refusal(tmp_path, "BW305")


def test_an_unfinished_output_is_told_how_to_go_on(tmp_path: Path) -> None:
    (tmp_path / ".bitwright").mkdir()
    assert "resumes" in _refusal(tmp_path, "BW308")
    (tmp_path / "config.json").write_text("{}")
    write_file(tmp_path / SHARDS[0], serialize({"a": A}))
    _refusal(tmp_path, "BW303")  # a directory of that name alone says nothing
    (tmp_path / ".bitwright/journal.jsonl").touch()
    _refusal(tmp_path, "BW308")
    _check(open_checkpoint(_sharded(tmp_path)))


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    _sharded(tmp_path)
    (tmp_path / SHARDS[1]).unlink()
    assert SHARDS[1] in _refusal(tmp_path, "BW303")
    (tmp_path / INDEX).unlink()
    assert SHARDS[1] in _refusal(tmp_path, "BW303")


def test_missing_shards_are_counted_and_five_are_named(tmp_path: Path) -> None:
    _sharded(tmp_path)
    _write_index(tmp_path, {str(n): f"model-{n:05d}-of-00009.safetensors" for n in range(9)})
    message = _refusal(tmp_path, "BW303")
    assert "9 of 9" in message and "model-00004-of-00009" in message and "and 4 more" in message
    assert "model-00005" not in message


def test_more_shards_than_any_model_has_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "MAX_SHARDS", 1)
    assert "more than 1 files" in _refusal(_sharded(tmp_path), "BW303")


def test_sets_of_shards_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    _sharded(tmp_path)
    (tmp_path / INDEX).unlink()
    write_file(tmp_path / "model-00001-of-00003.safetensors", serialize({"c": A}))
    _refusal(tmp_path, "BW301")


def test_names_in_the_index_and_in_the_shards_must_agree(tmp_path: Path) -> None:
    _sharded(tmp_path)
    _write_index(tmp_path, {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[1]})
    assert "1 tensors are not in the file" in (message := _refusal(tmp_path, "BW303")) and ": c" in message
    _write_index(tmp_path, {"a": SHARDS[0], "c": SHARDS[1]})
    message = _refusal(tmp_path, "BW303")
    assert ": c" in message and "1 tensors are in no entry" in message and ": b" in message
    _write_index(tmp_path, {"a": SHARDS[1], "b": SHARDS[0]})
    assert "2 tensors are not in the file" in _refusal(tmp_path, "BW303")
    write_file(tmp_path / SHARDS[1], serialize({"a": A, "b": B}))
    assert "another file" in _refusal(tmp_path, "BW303")
    write_file(tmp_path / SHARDS[0], serialize({}))
    write_file(tmp_path / SHARDS[1], serialize({}))
    assert "no tensors" in _refusal(tmp_path, "BW303")


@pytest.mark.parametrize("weight_map", [None, [], {}, {"a": 1}, {"a": None}, "x"])
def test_an_index_without_a_map_is_refused(tmp_path: Path, weight_map: object) -> None:
    _write_index(_sharded(tmp_path), weight_map)
    assert INDEX in _refusal(tmp_path, "BW303")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff", b'{"weight_map":{"a":"x","a":"y"}}', b"[" * 100_000])
def test_an_index_that_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (_sharded(tmp_path) / INDEX).write_bytes(content)
    assert INDEX in _refusal(tmp_path, "BW303")


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/passwd", "..", "sub/x.safetensors", "a\\b", "a\0", "", "~\n"]
)
def test_shards_outside_of_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    _sharded(tmp_path / "x")
    write_file(tmp_path / "x.safetensors", serialize({"a": A}))
    _write_index(tmp_path / "x", {"a": name})
    _refusal(tmp_path / "x", "BW310")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", INDEX, SHARDS[0]])
def test_links_out_of_the_directory_are_refused(tmp_path: Path, name: str) -> None:
    model = tmp_path / "x"
    _single(model) if name == "model.safetensors" else _sharded(model)
    (model / name).rename(tmp_path / "moved")
    (model / name).symlink_to(tmp_path / "moved")
    assert str(tmp_path / "moved") in _refusal(model, "BW310")


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b'{"a": 1, "a": 2}', b"\xff\xfe", b'{"a":' * 100_000])
def test_a_configuration_that_is_no_object_is_refused(tmp_path: Path, content: bytes) -> None:
    (_single(tmp_path) / "config.json").write_bytes(content)
    assert "config.json" in _refusal(tmp_path, "BW307")


@pytest.mark.parametrize("record", ["[]", '"x"', "1", "true"])
def test_a_quantization_config_that_is_no_object_is_refused(tmp_path: Path, record: str) -> None:
    (_single(tmp_path) / "config.json").write_text(f'{{"quantization_config": {record}}}')
    opened = open_checkpoint(tmp_path)
    with pytest.raises(BitwrightError, match="BW311"):
        _ = opened.quantization


def test_a_cut_shard_is_named_with_its_tensor_and_sizes(tmp_path: Path) -> None:
    _sharded(tmp_path)
    path = tmp_path / SHARDS[0]
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    message = _refusal(tmp_path, "BW302")
    assert (
        SHARDS[0] in message and "'a'" in message and str(len(content)) in message and str(len(content) - 4) in message
    )
    assert "fetch" in message


def test_a_tensor_that_is_not_there_is_named(tmp_path: Path) -> None:
    opened = open_checkpoint(_single(tmp_path))
    for read in (opened.read, opened.source, opened.stored):
        with pytest.raises(BitwrightError, match=r"BW303.*no tensor lm_head\.weight"):
            read("lm_head.weight")
