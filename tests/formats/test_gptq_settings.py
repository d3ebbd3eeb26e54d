"""The configuration of GPTQ checkpoints: what ours says, and what those of other writers say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitwright.core.errors import BitwrightError
from bitwright.core.scheme_names import parse
from bitwright.formats import awq, gptq
from bitwright.formats.checkpoint import Checkpoint, open_checkpoint
from bitwright.formats.records import LayerRecord
from bitwright.formats.safetensors_file import serialize
from bitwright.formats.storage import write_file
from bitwright.formats.table import find_format
from tests.formats.layers import Layer, decode_all, random_layer, same_tensor, scratch_directory, write_checkpoint

A, B, C = "model.layers.0.a", "model.layers.0.b", "model.layers.1.a"


def write(
    directory: Path, layers: dict[str, Layer], quantization: dict[str, Any] | None, version: int = 1
) -> Checkpoint:
    """Layers under any configuration; the version is that of the tensors."""
    tensors = {}
    for name, layer in layers.items():
        tensors |= gptq.encode(name, *layer, version)
    write_file(directory / "model.safetensors", serialize(tensors))
    config: dict[str, Any] = {"model_type": "llama"}
    if quantization is not None:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config))
    return open_checkpoint(directory)


def refused(checkpoint: Checkpoint) -> str:
    with pytest.raises(BitwrightError) as caught:
        decode_all(checkpoint)
    assert caught.value.code == "BW311"
    return str(caught.value)


def test_layers_of_several_schemes_have_rules(tmp_path: Path) -> None:
    layers = {A: random_layer("w4g32", (32, 64)), B: random_layer("w8", (32, 64)), C: random_layer("w4g32", (32, 64))}
    checkpoint = write_checkpoint(tmp_path, gptq.FORMAT, layers)
    quantization = checkpoint.quantization or {}
    assert (quantization["bits"], quantization["group_size"], quantization["lm_head"]) == (4, 32, False)
    assert quantization["dynamic"] == {r"+:^model\.layers\.0\.b$": {"bits": 8, "group_size": -1}}
    read = decode_all(checkpoint)
    assert all(same_tensor(read[name], tensor) for name, (tensor, _) in layers.items())


def test_layers_left_float_are_said_to_be_so() -> None:
    """W42: by a rule, which GPTQModel and vLLM know, and where blocks are alike by the list that others know."""
    record = LayerRecord(parse("w4g32"), (32, 64))
    config = gptq.FORMAT.config({A: record, C: record}, [B, "model.layers.1.b", "lm_head"])
    assert config["dynamic"] == {r"-:^model\.layers\.0\.b$": {}, r"-:^model\.layers\.1\.b$": {}}
    assert config["modules_in_block_to_quantize"] == [["a"]]
    config = gptq.FORMAT.config({A: record, B: record}, [C, "lm_head"])
    assert "modules_in_block_to_quantize" not in config and config["dynamic"] == {r"-:^model\.layers\.1\.a$": {}}
    assert gptq.FORMAT.config({A: record, "lm_head": record}, [])["lm_head"] is True


def test_symmetric_and_asymmetric_layers_are_of_two_versions() -> None:
    records = {A: LayerRecord(parse("w4g32"), (32, 64)), B: LayerRecord(parse("w4g32-asym"), (32, 64))}
    reason = gptq.FORMAT.refuse_together(records, [])
    assert reason is not None and "gptq_v2" in reason
    assert gptq.FORMAT_V2.refuse_together(records, []) is None
    assert gptq.FORMAT.refuse_together({A: records[A]}, []) is None


def test_both_in_version_2_come_back(tmp_path: Path) -> None:
    layers = {A: random_layer("w4g32", (32, 64)), B: random_layer("w4g32-asym", (32, 64))}
    checkpoint = write_checkpoint(tmp_path, gptq.FORMAT_V2, layers)
    assert find_format(checkpoint.quantization or {}) is gptq.FORMAT_V2
    read = decode_all(checkpoint)
    assert all(same_tensor(read[name], tensor) for name, (tensor, _) in layers.items())


def test_the_first_rule_that_matches_counts(tmp_path: Path) -> None:
    layers = {A: random_layer("w8g32", (32, 64)), B: random_layer("w4g32", (32, 64))}
    base = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    rules = {r".*layers\.0\.a": {"bits": 8}, r"+:.*layers\.0\..*": {"bits": 4}, r"-:.*\.z": {}}
    read = decode_all(write(tmp_path, layers, base | {"dynamic": rules}))
    assert all(same_tensor(read[name], tensor) for name, (tensor, _) in layers.items())
    assert "is not" in refused(write(tmp_path, layers, base | {"dynamic": {r"-:.*layers\.0\.a": {}, **rules}}))


@pytest.mark.parametrize(
    "rules",
    [
        {r"layers\.0": {"bits": 2}, r".*layers\.0": {"bits": 8}},  # the beginning of a name is enough, its middle not
        {r"+:^model\.layers\.0\.a$": {"bits": 8}, r"^model\.layers\.0\.a$": {"bits": 2}},
        {r"^model\.layers\.0\.a$": {"bits": 8}, r"-:.*\.a": {}},
    ],
)
def test_rules_are_looked_for_from_the_beginning_of_a_name(tmp_path: Path, rules: dict[str, Any]) -> None:
    """As GPTQModel does, whose patterns are matched and not searched for."""
    layers = {A: random_layer("w8g32", (32, 64)), "model.norms.0.layers": random_layer("w4g32", (32, 64))}
    base = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "dynamic": rules}
    read = decode_all(write(tmp_path, layers, base))
    assert all(same_tensor(read[name], tensor) for name, (tensor, _) in layers.items())


@pytest.mark.parametrize(
    ("modules", "accepted"),
    [
        ([["a"], ["b"]], True), (["a", "b"], True), (None, True), ([["a"]], False), ("ab", False), ([[1]], False),
        ([], False),
    ],
)  # fmt: skip
def test_the_list_of_modules_is_held_to(tmp_path: Path, modules: object, accepted: bool) -> None:
    layers = {
        A: random_layer("w4g32", (32, 64)),
        B: random_layer("w4g32", (32, 64)),
        "lm_head": random_layer("w4g32", (32, 64)),
    }
    base = {"quant_method": "gptq", "bits": 4, "group_size": 32, "modules_in_block_to_quantize": modules}
    checkpoint = write(tmp_path, layers, base)
    if accepted:
        assert len(decode_all(checkpoint)) == 3
    else:
        assert "modules_in_block" in refused(checkpoint)


def test_an_old_checkpoint_says_it_in_a_file_of_its_own(tmp_path: Path) -> None:
    layer = random_layer("w4g32", (32, 64))
    write(tmp_path, {A: layer}, None)
    old = {"bits": 4, "group_size": 32, "damp_percent": 0.01, "desc_act": False, "sym": True, "true_sequential": True}
    (tmp_path / "quantize_config.json").write_text(json.dumps(old))
    assert same_tensor(decode_all(open_checkpoint(tmp_path))[A], layer[0])
    (tmp_path / "model.safetensors").rename(tmp_path / "gptq_model-4bit-32g.safetensors")
    assert same_tensor(decode_all(open_checkpoint(tmp_path))[A], layer[0])
    (tmp_path / "quantize_config.json").write_text(json.dumps(old | {"is_marlin_format": True}))
    assert "marlin" in refused(open_checkpoint(tmp_path))


def test_an_old_file_beside_float_weights_means_nothing(tmp_path: Path) -> None:
    write_file(tmp_path / "model.safetensors", serialize({"a.weight": torch.ones(2, 2)}))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "quantize_config.json").write_text("not JSON")
    assert open_checkpoint(tmp_path).quantization is None


@pytest.mark.parametrize("version", [1, 2])
def test_symmetric_layers_of_autoround_tell_their_version(tmp_path: Path, version: int) -> None:
    layer = random_layer("w4g32", (32, 64))
    base = {"quant_method": "auto-round", "bits": 4, "group_size": 32, "sym": True, "packing_format": "auto_round"}
    assert same_tensor(decode_all(write(tmp_path, {A: layer}, base, version))[A], layer[0])


@pytest.mark.parametrize("method", ["auto-round", "intel/auto-round"])
def test_autoround_in_gptq_packing(tmp_path: Path, method: str) -> None:
    layers = {
        A: random_layer("w4g32-asym", (32, 64)),
        B: random_layer("w8-asym", (32, 64)),
        C: random_layer("w2g32-asym", (32, 64)),
    }
    base = {"quant_method": method, "bits": 4, "group_size": 32, "sym": False, "data_type": "int"}
    extra = {B: {"bits": 8, "group_size": -1}, r".*layers\.1\..*": {"bits": 2}, "model.layers.0.z": {"bits": 16}}
    packing = {"packing_format": "auto_round:auto_gptq", "extra_config": extra}
    read = decode_all(write(tmp_path, layers, base | packing))
    assert all(same_tensor(read[name], tensor) for name, (tensor, _) in layers.items())
    read = decode_all(write(tmp_path, layers, base | packing | {"packing_format": "auto_round"}, 2))
    assert all(same_tensor(read[name], tensor) for name, (tensor, _) in layers.items())
    assert "is not" in refused(write(tmp_path, layers, base | packing | {"extra_config": {A: {"bits": 16}}}))


def test_autoround_in_awq_packing(tmp_path: Path) -> None:
    layer, scheme = random_layer("w4g32-asym", (32, 64))
    write_file(tmp_path / "model.safetensors", serialize(awq.encode(A, layer, scheme)))
    quantization = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "bits": 4, "group_size": 32}
    config = {"quantization_config": quantization | {"sym": False}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert same_tensor(decode_all(open_checkpoint(tmp_path))[A], layer)


@pytest.mark.parametrize(
    "change",
    [
        {"bits": 5}, {"bits": True}, {"bits": "4"}, {"bits": None}, {"bits": 1 << 70}, {"group_size": 0},
        {"group_size": -2}, {"group_size": "32"}, {"group_size": 1 << 40}, {"sym": "yes"}, {"sym": None},
        {"checkpoint_format": "marlin"}, {"checkpoint_format": ["gptq"]}, {"checkpoint_format": "gptq_p"},
        {"is_marlin_format": True}, {"dynamic": []}, {"dynamic": {"a": 5}}, {"dynamic": {"(a+)+$": {}}},
        {"dynamic": {"(": {}}}, {"dynamic": {".*": {"bits": 7}}}, {"data_type": "fp"},
    ],
    ids=str,
)  # fmt: skip
def test_settings_that_are_not_read_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    base = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    refused(write(tmp_path, {A: random_layer("w4g32", (32, 64))}, base | change))


def test_a_layer_called_symmetric_must_be_so(tmp_path: Path) -> None:
    base = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    assert '"sym" to false' in refused(write(tmp_path, {A: random_layer("w4g32-asym", (32, 64))}, base))


VALUES = st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | st.text(max_size=12) | st.lists(st.integers())
JSON = st.recursive(
    VALUES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
)
KEYS = st.sampled_from(
    "bits group_size sym desc_act checkpoint_format format dynamic modules_in_block_to_quantize lm_head version "
    "is_marlin_format packing_format extra_config backend quant_method zero_point modules_to_not_convert w_bit".split()
)


@settings(max_examples=150)
@given(st.dictionaries(KEYS, JSON, max_size=4), st.sampled_from(["gptq", "awq", "auto-round"]))
def test_any_configuration_is_read_or_refused(changes: dict[str, Any], method: str) -> None:
    base = {"quant_method": method, "bits": 4, "group_size": 32, "sym": True, "packing_format": "auto_round:auto_gptq"}
    with scratch_directory() as folder:
        try:
            decode_all(write(folder, {A: random_layer("w4g32", (32, 64))}, base | changes))
        except BitwrightError as error:
            assert error.code[:3] == "BW3"


def test_rules_for_thousands_of_names_are_looked_up(tmp_path: Path) -> None:
    """Each layer's rule is found by its name, unless a pattern before it matches."""
    layers = {A: random_layer("w8g32", (32, 64)), C: random_layer("w2g32", (32, 64))}
    base = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
    exact = {rf"+:^model\.layers\.{number}\.a$": {"bits": 8} for number in range(20000)}
    read = decode_all(write(tmp_path, layers, base | {"dynamic": {r".*1\.a$": {"bits": 2}, **exact}}))
    assert all(same_tensor(read[name], tensor) for name, (tensor, _) in layers.items())
    patterns = {rf"model.layers.{number}.z": {} for number in range(2000)}
    assert "2000 patterns" in refused(write(tmp_path, layers, base | {"dynamic": patterns}))
