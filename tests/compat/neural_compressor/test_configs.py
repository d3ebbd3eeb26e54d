"""Configurations: the defaults of the document's tables, what is refused, dictionaries and JSON."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from bitwright.compat.neural_compressor.torch.quantization import (
    AutoRoundConfig,
    AWQConfig,
    GPTQConfig,
    HQQConfig,
    RTNConfig,
    TEQConfig,
)
from bitwright.compat.neural_compressor.torch.quantization.composition import read_config
from bitwright.compat.neural_compressor.torch.quantization.config import WeightOnlyConfig
from bitwright.compat.neural_compressor.torch.quantization.rules import weight_scheme

KINDS: dict[str, type[WeightOnlyConfig]] = {
    "rtn": RTNConfig, "gptq": GPTQConfig, "dpq": GPTQConfig, "autoround": AutoRoundConfig, "awq": AWQConfig,
    "teq": TEQConfig, "hqq": HQQConfig,
}  # fmt: skip
COMMON = {
    "dtype": "int", "bits": 4, "use_sym": True, "quant_lm_head": False, "use_double_quant": False,
    "double_quant_dtype": "int", "double_quant_bits": 8, "double_quant_use_sym": False, "double_quant_group_size": 256,
}  # fmt: skip
RANGES = {"group_dim": 1, "use_full_range": False, "use_mse_search": False, "use_layer_wise": False}
DEFAULTS: dict[str, dict[str, Any]] = {
    "rtn": COMMON | RANGES | {"group_size": 32, "model_path": ""},
    "gptq": COMMON | {
        "group_size": 32, "use_mse_search": False, "use_layer_wise": False, "model_path": "", "act_order": False,
        "hybrid_act_order": False, "percdamp": 0.01, "block_size": 128, "static_groups": False,
        "true_sequential": False, "fp8_aware": False, "protective_range": False,
    },
    "autoround": COMMON | {
        "group_size": 128, "enable_full_range": False, "batch_size": 8, "lr_scheduler": None,
        "enable_quanted_input": True, "enable_minmax_tuning": True, "lr": 0, "minmax_lr": None,
        "low_gpu_mem_usage": True, "iters": 200, "seqlen": 2048, "n_samples": 512, "sampler": "rand", "seed": 42,
        "n_blocks": 1, "gradient_accumulate_steps": 1, "not_use_best_mse": False, "dynamic_max_gap": -1,
        "scale_dtype": "float16", "scheme": "W4A16", "layer_config": None, "use_layer_wise": False, "model_path": "",
    },
    "awq": COMMON | RANGES | {"group_size": 32, "use_auto_scale": True, "use_auto_clip": True, "folding": False},
    "teq": COMMON | RANGES | {"group_size": 32, "folding": False},
    "hqq": COMMON | {
        "group_size": 64, "use_sym": False, "quant_zero": True, "quant_scale": False, "scale_quant_group_size": 128,
    },
}  # fmt: skip
ROW = re.compile(r"^\| +(\w+):? *(?:\((\w+)\))? *\|([^|]*)(?:\| *([^|]*?) *\|?)?$", re.MULTILINE)


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults(name: str) -> None:
    config = KINDS[name]()
    assert {field.name: getattr(config, field.name) for field in dataclasses.fields(config)} == DEFAULTS[name]


@pytest.mark.parametrize(("name", "rows"), [
    ("rtn", 5), ("gptq", 10), ("dpq", 2), ("autoround", 20), ("awq", 7), ("teq", 6), ("hqq", 3),
])  # fmt: skip
def test_defaults_are_those_of_the_document(document: str, name: str, rows: int) -> None:
    table = document[document.index(f"|  {name}_args") :]
    found = ROW.findall(table[: table.index("\n```" if name != "dpq" else "\n\n```")].split("\n", 2)[2])
    assert len(found) == rows
    config = KINDS[name]()
    for field, _, _, text in found:
        value = ast.literal_eval(text.rstrip(".")) if text else ""
        assert getattr(config, field) == value, field
        assert type(getattr(config, field)) is type(value), field


def test_common_arguments_are_those_of_the_document(document: str) -> None:
    names = re.findall(r"^\| +(\w+) \((?:str|int|bool)\) *\| *\[", document, re.MULTILINE)
    assert len(names) == 10
    for kind in KINDS.values():
        assert set(names) <= {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(("kind", "field", "value"), [
    (RTNConfig, "bits", 17), (RTNConfig, "bits", 0), (RTNConfig, "bits", 4.0), (RTNConfig, "bits", True),
    (RTNConfig, "group_size", 0), (RTNConfig, "group_size", -2), (RTNConfig, "dtype", "int99"),
    (RTNConfig, "use_sym", 1), (RTNConfig, "group_dim", 2), (RTNConfig, "model_path", 3),
    (GPTQConfig, "percdamp", -0.1), (GPTQConfig, "block_size", 0), (GPTQConfig, "double_quant_dtype", "nf4"),
    (GPTQConfig, "double_quant_bits", 9), (AWQConfig, "folding", "yes"), (TEQConfig, "use_full_range", None),
    (HQQConfig, "scale_quant_group_size", 0), (AutoRoundConfig, "iters", -1), (AutoRoundConfig, "scheme", "W9A16"),
    (AutoRoundConfig, "scale_dtype", "int8"), (AutoRoundConfig, "sampler", "best"), (AutoRoundConfig, "lr", 2),
])  # fmt: skip
def test_values_out_of_range_are_named_with_what_is_accepted(
    kind: type[WeightOnlyConfig], field: str, value: Any
) -> None:
    with pytest.raises(ValueError, match=rf"{field} is {re.escape(repr(value))}(.|\n)*accepted: "):
        kind(**{field: value})
    config = kind()
    with pytest.raises(ValueError, match=field):
        setattr(config, field, value)
    assert config == kind()


@pytest.mark.parametrize("kind", list(dict.fromkeys(KINDS.values())))
def test_unknown_arguments_are_named(kind: type[WeightOnlyConfig]) -> None:
    with pytest.raises(TypeError, match="bit_width"):
        kind(bit_width=4)  # type: ignore[call-arg]
    with pytest.raises(AttributeError, match="bit_width"):
        kind().bit_width = 4  # type: ignore[attr-defined]


@pytest.mark.parametrize(("kind", "fields", "named"), [
    (RTNConfig, {"dtype": "nf4", "bits": 3}, "bits"), (RTNConfig, {"dtype": "fp4", "use_sym": False}, "use_sym"),
    (RTNConfig, {"use_full_range": True, "use_sym": False}, "use_full_range"),
    (RTNConfig, {"use_full_range": True, "dtype": "nf4"}, "use_full_range"),
    (GPTQConfig, {"act_order": True, "hybrid_act_order": True}, "act_order"),
    (GPTQConfig, {"fp8_aware": True, "dtype": "nf4"}, "fp8_aware"),
    (AWQConfig, {"use_double_quant": True}, "use_double_quant"), (HQQConfig, {"dtype": "nf4"}, "dtype"),
    (HQQConfig, {"use_double_quant": True}, "use_double_quant"), (AutoRoundConfig, {"dtype": "fp4"}, "dtype"),
    (AutoRoundConfig, {"use_double_quant": True}, "use_double_quant"),
    (GPTQConfig, {"fp8_aware": True, "bits": 5}, "bits"),
    (GPTQConfig, {"fp8_aware": True, "use_double_quant": True}, "use_double_quant"),
    (RTNConfig, {"use_full_range": True, "bits": 1}, "use_full_range"), (AutoRoundConfig, {"bits": 1}, "bits"),
    (AutoRoundConfig, {"enable_full_range": True, "use_sym": False}, "enable_full_range"),
])  # fmt: skip
def test_fields_that_do_not_go_together(kind: type[WeightOnlyConfig], fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"{named} is"):
        kind(**fields)


def test_newer_names_are_accepted() -> None:
    config: Any = GPTQConfig(hybrid_order=True)  # type: ignore[call-arg]
    assert config.hybrid_act_order and config.hybrid_order
    config.hybrid_order = False
    assert not config.hybrid_act_order
    tuned = AutoRoundConfig(nsamples=7, nblocks=2)  # type: ignore[call-arg]
    assert (tuned.n_samples, tuned.n_blocks) == (7, 2)
    with pytest.raises(TypeError, match="nsamples is another name of n_samples"):
        AutoRoundConfig(nsamples=7, n_samples=7)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match="n_samples is 0"):
        AutoRoundConfig(nsamples=0)  # type: ignore[call-arg]


@pytest.mark.parametrize("kind", list(dict.fromkeys(KINDS.values())))
def test_dictionaries_and_json_give_back_the_same(kind: type[WeightOnlyConfig], tmp_path: Path) -> None:
    config = kind(bits=3, group_size=64)
    assert kind.from_dict(config.to_dict()) == config
    assert kind.from_dict({kind.algorithm: config.to_dict()}) == config
    config.set_local("lm_head", kind(dtype="fp32")).set_local(torch.nn.Linear, kind(bits=8))
    assert kind.from_dict(config.to_dict()) == config != kind(bits=3, group_size=64)
    config.set_local(".*o_proj", GPTQConfig(bits=2))
    config.to_json_file(tmp_path / "config.json")
    assert kind.from_json_file(tmp_path / "config.json") == config
    assert json.loads(config.to_json()) == json.loads(config.to_json_string()) == config.to_dict()


def test_layer_config_survives_json() -> None:
    config = AutoRoundConfig(layer_config={"a": {"W8A16"}, "b": {"bits": 2, "sym": False}, "c": "W2A16G64"})
    again = AutoRoundConfig.from_dict(json.loads(config.to_json()))
    assert [(rule.pattern, rule.config.bits, rule.config.group_size, rule.config.use_sym) for rule in again.local] == [
        ("a", 8, 128, True), ("b", 2, 128, False), ("c", 2, 64, True),
    ]  # fmt: skip


@pytest.mark.parametrize("rule", [{"bit": 3}, {"bits": 99}, "W99A16", 4, {"W8A16", "W4A16"}])
def test_layer_config_is_checked(rule: Any) -> None:
    with pytest.raises(ValueError, match=r"W|bit|layer_config"):
        AutoRoundConfig(layer_config={"fc1": rule})


def test_a_preset_gives_way_to_what_is_said() -> None:
    assert (AutoRoundConfig(scheme="W2A16").bits, AutoRoundConfig(scheme="W2A16", bits=3).bits) == (2, 3)
    assert AutoRoundConfig(scheme="W2A16G64").group_size == 64
    config = AutoRoundConfig()
    config.scheme = "W8A16"
    assert config.bits == 8


@pytest.mark.parametrize(("config", "name"), [
    (RTNConfig(), "w4g32"), (RTNConfig(group_size=-1, use_sym=False), "w4-asym"), (RTNConfig(dtype="nf4"), "nf4g32"),
    (RTNConfig(dtype="fp4"), "fp4bnbg32"), (RTNConfig(dtype="fp4_e2m1_bnb"), "fp4bnbg32"),
    (RTNConfig(dtype="fp4_e2m1"), "fp4e2m1g32"), (RTNConfig(group_dim=0), "w4g32-axis0"),
    (GPTQConfig(use_double_quant=True), "w4g32-dq(w8g256-asym-sf32)"),
    (GPTQConfig(use_double_quant=True, double_quant_use_sym=True, double_quant_bits=6, double_quant_group_size=-1),
     "w4g32-dq(w6-sf32)"),
    (HQQConfig(), "w4g64-asym"), (HQQConfig(quant_zero=False), "w4g64-asym-fz"),
    (HQQConfig(quant_scale=True), "w4g64-asym-dq(w8g128-asym-sf32)"), (HQQConfig(use_sym=True), "w4g64"),
    (HQQConfig(quant_scale=True, quant_zero=False), "w4g64-asym-fz-dq(w8g128-asym-sf32)"),
    (AutoRoundConfig(), "w4g128"), (AutoRoundConfig(scale_dtype="bf16"), "w4g128-sbf16"),
])  # fmt: skip
def test_what_is_stored(config: WeightOnlyConfig, name: str) -> None:
    assert weight_scheme(config).name == name


@pytest.mark.parametrize(("values", "words"), [
    ({"rtm": {}}, "unknown algorithm 'rtm'"), ({"rtn": {"bits": 99}}, "bits is 99"),
    ({"rtn": {"global": {}, "bits": 4}}, "'bits' stands beside"), ({"rtn": {"bits": 4}, "gptq": {"bits": 4}}, "both"),
])  # fmt: skip
def test_dictionaries_are_checked(values: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        read_config(values)


@pytest.mark.parametrize("config", [None, 4, {}, []])
def test_what_is_no_configuration(config: Any) -> None:
    with pytest.raises(TypeError, match="RTNConfig"):
        read_config(config)


def test_rules_take_names_patterns_and_classes_alone() -> None:
    with pytest.raises(TypeError, match="configuration"):
        RTNConfig().set_local("fc1", {"bits": 8})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="layer names"):
        RTNConfig().set_local(3, RTNConfig())  # type: ignore[arg-type]
