"""AWQ checkpoints: what AutoAWQ's layouts are, from GPTQModel's own files and from a naive restatement."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse
from bitwright.formats import awq
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.formats.records import LayerRecord
from bitwright.formats.safetensors_file import serialize
from bitwright.formats.storage import write_file
from bitwright.formats.table import find_format
from tests.formats.layers import decode_all, random_layer, same_tensor, write_checkpoint
from tests.golden.write_gptq import AWQ, count_numbers

GOLDEN = Path(__file__).parents[1] / "golden"
NAME = "model.layers.0.mlp.up_proj"
SCHEMES = ["w4g32", "w4g32-asym", "w4-asym", "w4g16-asym-signed"]


def naive_words(codes: Tensor) -> list[list[int]]:
    """``[out, n]`` to ``[n][out/8]``: nibble i of word c holds output feature 8c + [0, 2, 4, 6, 1, 3, 5, 7][i]."""
    rows = []
    for column in codes.t().tolist():
        words = []
        for start in range(0, len(column), 8):
            word = sum(column[start + place] << (4 * i) for i, place in enumerate([0, 2, 4, 6, 1, 3, 5, 7]))
            words.append(word - (1 << 32) if word >> 31 else word)
        rows.append(words)
    return rows


@pytest.mark.parametrize("name", SCHEMES)
def test_our_tensors_are_those_of_the_specification(name: str) -> None:
    layer, scheme = random_layer(name, (24, 64))
    shift = 8 if scheme.weight.code == "int" else 0
    zero = torch.full(layer.dense_scale().shape, 8) if layer.zero is None else layer.zero.to(torch.int64) + shift
    encoded = awq.encode(NAME, layer, scheme)
    assert encoded[f"{NAME}.qweight"].tolist() == naive_words(layer.codes.to(torch.int64) + shift)
    assert encoded[f"{NAME}.qzeros"].tolist() == naive_words(zero)
    assert torch.equal(encoded[f"{NAME}.scales"], layer.dense_scale().t())
    assert len(encoded) == 3 and all(tensor.is_contiguous() for tensor in encoded.values())


@pytest.mark.parametrize("name", SCHEMES)
def test_a_layer_comes_back(tmp_path: Path, name: str) -> None:
    layer, scheme = random_layer(name, (24, 64))
    read = decode_all(write_checkpoint(tmp_path, awq.FORMAT, {NAME: (layer, scheme)}))[NAME]
    assert same_tensor(read, layer) or "signed" in name
    assert torch.equal(read.dequantize(), layer.dequantize())


@pytest.mark.parametrize("folder", AWQ)
def test_golden_checkpoints_are_read_exactly(folder: str) -> None:
    read = decode_all(open_checkpoint(GOLDEN / folder))
    assert set(read) == set(AWQ[folder])
    for name, layer in AWQ[folder].items():
        numbers, tensor = count_numbers(layer, 0), read[name]
        codes = tensor.codes.to(torch.int16) + (8 if layer.symmetric else 0)
        assert torch.equal(codes.to(torch.uint8), numbers.codes) and torch.equal(tensor.dense_scale(), numbers.scale)
        assert tensor.zero is None if layer.symmetric else torch.equal(tensor.zero, numbers.zero)  # type: ignore[arg-type]


@pytest.mark.parametrize("folder", ["awq-gemm", "awq-gemm-sym"])
def test_a_checkpoint_that_is_read_and_written_again_has_the_same_bytes(folder: str) -> None:
    checkpoint = open_checkpoint(GOLDEN / folder)
    found = find_format(checkpoint.quantization or {})
    records = found.layers(checkpoint)
    written: dict[str, Tensor] = {}
    for name, record in records.items():
        written |= found.encode(name, found.decode(checkpoint, name, record), record.scheme)
    stored = load_file(GOLDEN / folder / "model.safetensors")
    assert set(written) == {name for name in stored if not name.endswith("bias")}
    assert all(written[name].dtype == stored[name].dtype for name in written)
    assert all(torch.equal(written[name], stored[name]) for name in written)
    keys = ("bits", "group_size", "zero_point", "version", "modules_to_not_convert")
    assert all(found.config(records, [])[key] == (checkpoint.quantization or {})[key] for key in keys)


def rewrite(directory: Path, folder: str, **changes: Any) -> Path:
    """A golden checkpoint with some of its configuration changed; a value of ``...`` takes the field away."""
    config = json.loads((GOLDEN / folder / "config.json").read_text())
    quantization = config["quantization_config"] | changes
    config["quantization_config"] = {key: value for key, value in quantization.items() if value is not ...}
    write_file(directory / "model.safetensors", [(GOLDEN / folder / "model.safetensors").read_bytes()])
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.mark.parametrize(
    "changes",
    [
        {"version": "GEMM"}, {"version": "exllama"}, {"version": "ipex"}, {"version": ..., "format": "gemm"},
        {"version": ...}, {"bits": ..., "w_bit": 4, "group_size": ..., "q_group_size": 32},
        {"modules_to_not_convert": ["lm_head", "vision", "proj", "model.layers.00"]},
    ],
    ids=str,
)  # fmt: skip
def test_other_spellings_are_read(tmp_path: Path, changes: dict[str, Any]) -> None:
    read = decode_all(open_checkpoint(rewrite(tmp_path, "awq-gemm", **changes)))
    assert all(
        same_tensor(tensor, decode_all(open_checkpoint(GOLDEN / "awq-gemm"))[name]) for name, tensor in read.items()
    )


def test_an_old_checkpoint_says_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    rewrite(tmp_path, "awq-gemm")
    (tmp_path / "config.json").write_text("{}")
    old = {"zero_point": True, "q_group_size": 32, "w_bit": 4, "version": "GEMM"}
    (tmp_path / "quant_config.json").write_text(json.dumps(old))
    assert len(decode_all(open_checkpoint(tmp_path))) == 2


def test_symmetric_layers_may_have_no_zero_points(tmp_path: Path) -> None:
    layer, scheme = random_layer("w4g32", (24, 64))
    tensors = awq.encode(NAME, layer, scheme)
    del tensors[f"{NAME}.qzeros"]
    write_file(tmp_path / "model.safetensors", serialize(tensors))
    quantization = awq.config({NAME: LayerRecord(scheme, layer.shape)}, [])
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    assert same_tensor(decode_all(open_checkpoint(tmp_path))[NAME], layer)


@pytest.mark.parametrize(
    ("folder", "changes", "code"),
    [
        ("awq-gemm", {"bits": 8}, "BW311"), ("awq-gemm", {"bits": "4"}, "BW311"),
        ("awq-gemm", {"version": "marlin"}, "BW311"),
        ("awq-gemm", {"group_size": 0}, "BW311"), ("awq-gemm", {"group_size": 64}, "BW304"),
        ("awq-gemm", {"group_size": 48}, "BW304"), ("awq-gemm", {"zero_point": "no"}, "BW311"),
        ("awq-gemm", {"zero_point": False}, "BW311"), ("awq-gemm", {"modules_to_not_convert": ["q_proj"]}, "BW311"),
        ("awq-gemm", {"modules_to_not_convert": "lm_head"}, "BW311"), ("awq-gemm", {"version": "gemv"}, "BW304"),
        ("awq-gemm", {"version": "gemv_fast"}, "BW304"), ("awq-gemv", {"version": "gemm"}, "BW304"),
        ("awq-gemv", {"group_size": 16}, "BW304"), ("awq-gemv_fast", {"version": "gemv"}, "BW304"),
        ("awq-llm-awq", {"group_size": 64}, "BW304"), ("awq-gemm-sym", {"group_size": -1}, "BW304"),
    ],
    ids=str,
)  # fmt: skip
def test_what_does_not_agree_is_refused(tmp_path: Path, folder: str, changes: dict[str, Any], code: str) -> None:
    with pytest.raises(BitwrightError) as caught:
        decode_all(open_checkpoint(rewrite(tmp_path, folder, **changes)))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("nf4g32", (32, 64), "nf4"), ("w4g32-dq", (32, 64), "double"), ("A16W4", (32, 64), "floats"),
        ("w4g32-axis0", (32, 64), "input features"), ("w8", (32, 64), "4 bits, not 8"),
        ("w4a8", (32, 64), "activations"), ("w4g32-sbf16", (32, 64), "float16"), ("w4g32", (36, 64), "not 36"),
        ("w4g8", (32, 64), "not 8"),
        ("w4g128", (32, 64), "do not divide 64"),
    ],
)  # fmt: skip
def test_what_cannot_be_stored_is_refused_with_the_reason(name: str, shape: tuple[int, int], words: str) -> None:
    reason = awq.refuse(parse(name), shape)
    assert reason is not None and words in reason


def test_there_is_one_setting_for_all_layers() -> None:
    """W42: layers left float are named, since exceptions are all that the format knows."""
    record = LayerRecord(parse("w4g32-asym"), (32, 64))
    fc1, fc10 = "model.layers.0.fc1", "model.layers.0.fc10"
    assert awq.config({NAME: record}, ["lm_head", fc1])["modules_to_not_convert"] == ["lm_head", fc1]
    assert awq.refuse_together({NAME: record, fc1: record}, ["lm_head"]) is None
    other = LayerRecord(parse("w4g32"), (32, 64))
    assert "one setting" in (awq.refuse_together({NAME: record, fc1: other}, []) or "")
    assert "lm_head" in (awq.refuse_together({NAME: record, "lm_head": record}, []) or "")
    assert "in its name" in (awq.refuse_together({fc10: record}, [fc1]) or "")


def test_reordered_columns_are_refused() -> None:
    layer, scheme = random_layer("w4g32-asym", (32, 64))
    index = torch.arange(64, dtype=torch.int32) % 2
    moved = QuantizedTensor(
        scheme=layer.scheme, codes=layer.codes, scale=layer.scale, zero=layer.zero, group_index=index
    )
    with pytest.raises(BitwrightError, match=r"(?s)BW205.*consecutive columns.*--format native"):
        awq.encode(NAME, moved, scheme)
