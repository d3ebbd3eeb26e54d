"""Reading compressed-tensors checkpoints of other writers, old and new, and refusing what is damaged."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.core.scheme_names import parse
from bitwright.formats.checkpoint import Checkpoint, open_checkpoint
from bitwright.formats.compressed_tensors import FORMAT
from bitwright.formats.records import LayerRecord
from bitwright.formats.safetensors_file import serialize
from bitwright.formats.storage import write_file
from tests.formats.layers import decode_all, make_layer, random_layer, write_checkpoint

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
NAME = "model.layers.0.mlp.up_proj"


def _signed(codes: Tensor, bits: int) -> Tensor:
    return codes if codes.dtype == torch.int8 else (codes.to(torch.int16) - (1 << (bits - 1))).to(torch.int8)


@pytest.mark.parametrize("version", ["0.17", "0.20"])
def test_checkpoints_of_the_package_are_read(version: str) -> None:
    """Version 0.17 pads codes of odd widths, 0.20 packs them densely; one layer is as wide either way."""
    checkpoint = open_checkpoint(GOLDEN / f"compressed-tensors-{version}")
    _assert_expected(checkpoint)
    packed = checkpoint.stored("model.layers.0.linear.weight_packed").entry.shape
    assert packed == ((16, 7) if version == "0.17" else (16, 6))


@pytest.mark.parametrize("version", ["0.17", "0.20"])
def test_without_a_version_the_empty_bits_tell_how_codes_are_packed(tmp_path: Path, version: str) -> None:
    shutil.copytree(GOLDEN / f"compressed-tensors-{version}", tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_bytes())
    del config["quantization_config"]["version"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    _assert_expected(open_checkpoint(tmp_path))


def _assert_expected(checkpoint: Checkpoint) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    expected = safetensors.load_file(checkpoint.directory / "expected.safetensors")
    records = FORMAT.layers(checkpoint)
    assert len(records) == 9
    for name, record in records.items():
        codes, zero = expected[f"{name}.codes"].float(), expected[f"{name}.zero"].float()
        scale = checkpoint.read(f"{name}.weight_scale").float()
        spread = codes.shape[1] // scale.shape[1]
        wanted = (codes - zero.repeat_interleave(spread, 1)) * scale.repeat_interleave(spread, 1)
        assert torch.equal(FORMAT.decode(checkpoint, name, record).dequantize(), wanted), name


def _padded(codes: Tensor, bits: int) -> Tensor:
    """Older packing, element by element: ``32 // bits`` codes a word, along the last dimension."""
    per_word = 32 // bits
    words = torch.zeros(codes.shape[0], -(-codes.shape[1] // per_word), dtype=torch.int64)
    for row in range(codes.shape[0]):
        for column in range(codes.shape[1]):
            words[row, column // per_word] |= int(codes[row, column]) << (column % per_word * bits)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
@pytest.mark.parametrize("shape", [(10, 32), (31, 64), (40, 40), (7, 96)], ids=str)
def test_padded_codes_and_zero_points_are_read(tmp_path: Path, bits: int, shape: tuple[int, int]) -> None:
    layer, scheme = random_layer(f"w{bits}-asym", shape)
    assert layer.zero is not None
    good = FORMAT.encode(NAME, layer, scheme)
    write_checkpoint(tmp_path, FORMAT, {NAME: (layer, scheme)})
    old = {
        f"{NAME}.weight_packed": _padded(layer.codes, bits),
        f"{NAME}.weight_zero_point": _padded(layer.zero.t(), bits).t().contiguous(),
    }
    write_file(tmp_path / "model.safetensors", serialize(good | old))
    config = json.loads((tmp_path / "config.json").read_bytes())
    config["quantization_config"]["version"] = "0.15.0.1"
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    read = FORMAT.decode(checkpoint, NAME, FORMAT.layers(checkpoint)[NAME])
    assert torch.equal(read.codes, layer.codes) and read.zero is not None and torch.equal(read.zero, layer.zero)


def test_what_other_writers_do_differently_is_read(tmp_path: Path) -> None:
    """Zero points of symmetric layers, unpacked ones, scales without a second dimension, groups by pattern, g_idx."""
    layer, scheme = random_layer("w4g32-asym", (8, 64))
    assert layer.zero is not None
    pack = FORMAT.encode("model.a.q_proj", layer, scheme)
    pack["model.a.q_proj.weight_zero_point"] = _signed(layer.zero, 4)
    pack["model.a.q_proj.weight_g_idx"] = torch.full((64,), -1, dtype=torch.int32)
    byte_layer, byte_scheme = random_layer("w8a8", (8, 64))
    data = FORMAT.encode("model.b", byte_layer, byte_scheme)
    data["model.b.weight_scale"] = data["model.b.weight_scale"].reshape(8)
    data["model.b.weight_zero_point"] = torch.zeros(8, 1, dtype=torch.int8)
    index = (torch.arange(64) % 2).to(torch.int32)
    reordered = FORMAT.encode("model.c", layer, scheme) | {"model.c.weight_g_idx": index}
    records = {"x": LayerRecord(scheme, (8, 64)), "model.b": LayerRecord(byte_scheme, (8, 64))}
    config = FORMAT.config(records, [])
    config["config_groups"]["group_0"]["targets"] = [r"re:.*\.[qkv]_proj$", "model.c"]
    config["config_groups"]["group_1"]["targets"] = ["Linear"]
    write_file(tmp_path / "model.safetensors", serialize(pack | data | reordered))
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    checkpoint = open_checkpoint(tmp_path)
    found = FORMAT.layers(checkpoint)
    assert {name: record.scheme for name, record in found.items()} == {
        "model.a.q_proj": scheme,
        "model.b": byte_scheme,
        "model.c": scheme,
    }
    read = {name: FORMAT.decode(checkpoint, name, record) for name, record in found.items()}
    assert torch.equal(read["model.a.q_proj"].dequantize(), layer.dequantize())
    assert torch.equal(read["model.b"].dequantize(), byte_layer.dequantize())
    assert torch.equal(read["model.c"].dequantize(), replace(layer, group_index=index).dequantize())


def _quantization(change: dict[str, Any], *, group: dict[str, Any], weights: dict[str, Any]) -> dict[str, Any]:
    config = FORMAT.config({NAME: LayerRecord(parse("w4g32"), (8, 64))}, [])
    config["config_groups"]["group_0"] |= group
    if isinstance(config["config_groups"]["group_0"]["weights"], dict):
        config["config_groups"]["group_0"]["weights"] |= weights
    return config | change


def test_a_strategy_that_is_not_named_follows_from_the_group_size(tmp_path: Path) -> None:
    """And a group without weights, for a cache for instance, is no group of layers."""
    grouped, channelled = make_layer("w4g32", (8, 64)), make_layer("w4", (8, 64))
    write_file(
        tmp_path / "model.safetensors", serialize(FORMAT.encode("a", *grouped) | FORMAT.encode("b", *channelled))
    )
    groups = {
        "cache": {"targets": ["Linear"], "weights": None},
        "x": {"targets": ["a"], "weights": {"num_bits": 4, "group_size": 32}},
        "y": {"targets": ["b"], "weights": {"num_bits": 4, "group_size": -1}},
    }
    quantization = _quantization({"config_groups": groups}, group={}, weights={})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    read = decode_all(open_checkpoint(tmp_path))
    assert torch.equal(read["a"].dequantize(), grouped[0].dequantize())
    assert torch.equal(read["b"].dequantize(), channelled[0].dequantize())


def test_a_checkpoint_without_any_quantized_tensor_is_refused(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", serialize({"a.weight": torch.zeros(2, 2)}))
    quantization = _quantization({}, group={}, weights={})
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": quantization}))
    with pytest.raises(BitwrightError, match=r"BW311.*no tensor of the checkpoint is quantized"):
        FORMAT.layers(open_checkpoint(tmp_path))


ACTIVATIONS = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}


@pytest.mark.parametrize(
    ("change", "group", "weights", "code", "words"),
    [
        ({"format": "nvfp4-pack-quantized"}, {}, {}, "BW311", "nvfp4"),
        ({"format": None}, {}, {}, "BW311", "format"),
        ({"quantization_status": "frozen"}, {}, {}, "BW311", "quantization_status"),
        ({"transform_config": {"config_groups": {}}}, {}, {}, "BW311", "transform_config"),
        ({"config_groups": []}, {}, {}, "BW311", "config_groups"),
        ({"config_groups": {"W4A16": ["Linear"]}}, {}, {}, "BW311", "W4A16"),
        ({}, {"weights": ["x"]}, {}, "BW311", "group_0"),
        ({}, {"targets": "Linear"}, {}, "BW311", "group_0"),
        ({}, {"targets": ["lm_head"]}, {}, "BW311", NAME),
        ({}, {"targets": ["re:("]}, {}, "BW311", "regular expression"),
        ({}, {"targets": ["re:(a+)+$"]}, {}, "BW311", "too complex"),
        ({}, {"targets": ["re:" + ".*a" * 20]}, {}, "BW311", "too complex"),
        ({}, {"output_activations": ACTIVATIONS}, {}, "BW311", "outputs"),
        ({}, {"input_activations": ACTIVATIONS}, {}, "BW311", "activations"),
        ({}, {"input_activations": "int8"}, {}, "BW311", "activations"),
        ({}, {}, {"num_bits": 16}, "BW311", "2 to 8 bits"),
        ({}, {}, {"num_bits": 4.0}, "BW311", "2 to 8 bits"),
        ({}, {}, {"type": "float"}, "BW311", "whole numbers"),
        ({}, {}, {"symmetric": "yes"}, "BW311", "symmetric"),
        ({}, {}, {"strategy": "block"}, "BW311", "block"),
        ({}, {}, {"group_size": -32}, "BW311", "strategy"),
        ({}, {}, {"group_size": 48}, "BW304", "48"),
        ({}, {}, {"group_size": 64}, "BW304", "weight_scale"),
        ({}, {}, {"num_bits": 8}, "BW304", "weight_packed"),
        ({}, {}, {"symmetric": False}, "BW303", "weight_zero_point"),
    ],
)
def test_a_configuration_that_is_not_understood_is_refused(
    tmp_path: Path, change: dict[str, Any], group: dict[str, Any], weights: dict[str, Any], code: str, words: str
) -> None:
    write_file(tmp_path / "model.safetensors", serialize(FORMAT.encode(NAME, *make_layer("w4g32", (8, 64)))))
    config = {"quantization_config": _quantization(change, group=group, weights=weights)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(BitwrightError) as caught:
        decode_all(checkpoint)
    assert caught.value.code == code and words in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "code"),
    [
        ("weight_shape", torch.tensor([8, 65]), "BW304"),
        ("weight_shape", torch.tensor([9, 64]), "BW304"),
        ("weight_shape", torch.tensor([8, -64]), "BW304"),
        ("weight_shape", torch.tensor([8, 1 << 60]), "BW304"),
        ("weight_shape", torch.tensor([8.0, 64.0]), "BW304"),
        ("weight_packed", torch.zeros(8, 8), "BW304"),
        ("weight_packed", torch.zeros(8, 9, dtype=torch.int32), "BW304"),
        ("weight_packed", torch.zeros(2, 8, 8, dtype=torch.int32), "BW304"),
        ("weight_scale", torch.ones(8, 2, dtype=torch.int32), "BW304"),
        ("weight_scale", torch.ones(8, 1), "BW304"),
        ("weight_scale", torch.full((8, 2), torch.nan), "BW309"),
        ("weight_zero_point", torch.zeros(1, 2, dtype=torch.float16), "BW304"),
        ("weight_zero_point", torch.full((8, 2), 9, dtype=torch.int8), "BW311"),
        ("weight_g_idx", torch.full((64,), 2, dtype=torch.int32), "BW311"),
        ("weight", torch.zeros(8, 64), "BW311"),
        ("weight_global_scale", torch.zeros(1), "BW303"),
    ],
)
def test_tensors_that_contradict_the_configuration_are_refused(
    tmp_path: Path, field: str, value: Tensor, code: str
) -> None:
    layer = make_layer("w4g32-asym", (8, 64))
    write_checkpoint(tmp_path, FORMAT, {NAME: layer})
    tensors = FORMAT.encode(NAME, *layer) | {f"{NAME}.{field}": value}
    write_file(tmp_path / "model.safetensors", serialize(tensors))
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(BitwrightError) as caught:
        decode_all(checkpoint)
    assert caught.value.code == code


def test_narrow_codes_stored_in_bytes_must_keep_to_their_bits(tmp_path: Path) -> None:
    layer = make_layer("w4a8", (8, 64))
    write_checkpoint(tmp_path, FORMAT, {NAME: layer})
    tensors = FORMAT.encode(NAME, *layer)
    tensors[f"{NAME}.weight"][3, 5] = 8
    write_file(tmp_path / "model.safetensors", serialize(tensors))
    checkpoint = open_checkpoint(tmp_path)
    with pytest.raises(BitwrightError, match=r"BW311.*4 bits"):
        FORMAT.decode(checkpoint, NAME, FORMAT.layers(checkpoint)[NAME])
