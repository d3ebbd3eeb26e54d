"""Which configuration a layer falls under: types, names, expressions, the output head, several algorithms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.compat.neural_compressor.torch.quantization import (
    GPTQConfig,
    HQQConfig,
    RTNConfig,
    WeightOnlyLinear,
    convert,
    prepare,
    quantize,
)
from bitwright.compat.neural_compressor.torch.quantization.composition import read_config
from bitwright.compat.neural_compressor.torch.quantization.rules import choose
from tests.quantization.tiny import Plain, build_model

IDS = torch.arange(64).view(2, 32) % 32


class Ten(nn.Module):
    """Layers whose names begin alike, without blocks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for number in range(1, 11):
            setattr(self, f"fc{number}", nn.Linear(16, 16))
        self.lm_head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        for number in range(1, 11):
            x = torch.tanh(getattr(self, f"fc{number}")(x))
        return self.lm_head(x)


def bits(config: RTNConfig | dict[str, Any], model: nn.Module | None = None) -> dict[str, int]:
    """Bits by layer name; layers that stay as they are are not in it."""
    return {name: each.bits for name, each in choose(model or Ten(), read_config(config)).items()}


def rule(width: int) -> RTNConfig:
    return RTNConfig(bits=width)


def test_a_name_is_a_whole_name() -> None:
    found = bits(RTNConfig().set_local("fc1", rule(8)))
    assert (found["fc1"], found["fc10"]) == (8, 4)
    found = bits(RTNConfig().set_local("fc1.*", rule(8)))
    assert [name for name, width in found.items() if width == 8] == ["fc1", "fc10"]
    assert set(bits(RTNConfig().set_local("fc[2-9]", rule(3)).set_local("fc.", rule(5))).values()) == {4, 5}


def test_a_name_beats_a_type_and_a_type_beats_the_rest() -> None:
    config = RTNConfig(bits=2).set_local("fc2", rule(8)).set_local(nn.Linear, rule(3))
    assert bits(config)["fc2"] == 8 and bits(config)["fc3"] == 3
    assert bits(RTNConfig(bits=2).set_local("Linear", rule(3)))["fc3"] == 3
    assert bits(RTNConfig(bits=2).set_local(nn.Linear, rule(3)).set_local("Linear", rule(5)))["fc3"] == 5


def test_the_last_expression_wins_and_an_exact_name_always() -> None:
    config = RTNConfig().set_local("fc2", rule(8)).set_local("fc[12]", rule(2)).set_local("fc.", rule(3))
    found = bits(config)
    assert (found["fc1"], found["fc2"], found["fc3"], found["fc10"]) == (3, 8, 3, 4)
    config.set_local("fc[12]", rule(6))  # set again, it is the last
    assert bits(config)["fc1"] == 6
    assert bits(RTNConfig().set_local(["fc1", "fc2"], rule(7)))["fc2"] == 7


def test_fp32_leaves_layers_as_they_are() -> None:
    assert "fc4" not in bits(RTNConfig().set_local("fc4", RTNConfig(dtype="fp32")))
    only = RTNConfig(dtype="fp32").set_local("fc4", rule(8))
    assert bits(only) == {"fc4": 8}


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_the_output_head_is_left_alone_unless_a_rule_names_it(family: str) -> None:
    """W14: by name with 8 bits, by the argument, and untouched to the last byte without either."""
    model = build_model(family)
    head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    untouched = quantize(model, RTNConfig().set_local(nn.Linear, rule(8)), inplace=False)
    assert torch.equal(untouched.get_submodule(head).weight, model.get_submodule(head).weight)
    named = quantize(model, RTNConfig().set_local(head, rule(8)), inplace=False).get_submodule(head)
    assert isinstance(named, WeightOnlyLinear) and named.scheme.name == "w8g32"
    asked = quantize(model, RTNConfig(quant_lm_head=True), inplace=False).get_submodule(head)
    assert isinstance(asked, WeightOnlyLinear) and asked.scheme.name == "w4g32"
    excluded = RTNConfig(quant_lm_head=True).set_local(head, RTNConfig(dtype="fp32"))
    assert head not in bits(excluded, model)


def test_a_head_is_known_by_its_name_where_the_model_does_not_say() -> None:
    assert "lm_head" not in bits(RTNConfig())
    assert bits(RTNConfig(quant_lm_head=True))["lm_head"] == 4
    made = quantize(Ten(), RTNConfig().set_local("lm_head", rule(8)))
    assert isinstance(made.lm_head, WeightOnlyLinear)


TWO: dict[str, Any] = {
    "rtn": {"local": {r".*q_proj": {"bits": 8, "group_size": 32}}},
    "gptq": {"local": {r".*(up|gate)_proj": {"bits": 3, "group_size": 32}}},
}


def test_two_algorithms_on_disjoint_layers() -> None:
    """W15: the same layers and the same numbers by either way."""
    at_once = quantize(build_model("llama"), TWO, lambda model: model(IDS))
    prepared = prepare(build_model("llama"), TWO)
    prepared(IDS)
    by_steps = convert(prepared)
    made = {
        name: (layer.algorithm, layer.scheme.name)
        for name, layer in at_once.named_modules()
        if isinstance(layer, WeightOnlyLinear)
    }
    assert len(made) == 6
    for name, (algorithm, scheme) in made.items():
        assert (algorithm, scheme) == (("rtn", "w8g32") if "q_proj" in name else ("gptq", "w3g32"))
        one, other = (model.get_submodule(name) for model in (at_once, by_steps))
        assert isinstance(one, WeightOnlyLinear) and isinstance(other, WeightOnlyLinear)
        assert torch.equal(one.unpack().codes, other.unpack().codes)
    assert torch.equal(at_once(IDS).logits, by_steps(IDS).logits)


def test_one_of_two_algorithms_may_have_all_other_layers() -> None:
    both = {"rtn": {"global": {"bits": 8}}, "hqq": {"local": {"fc1": {"bits": 3}}}}
    found = choose(Ten(), read_config(both))
    assert {type(each) for each in found.values()} == {RTNConfig, HQQConfig}
    assert isinstance(found["fc1"], HQQConfig) and len(found) == 10
    idle = {"rtn": {"global": {"bits": 8}}, "hqq": {"global": {"dtype": "fp32"}, "local": {"fc1": {"bits": 3}}}}
    assert {name: each.bits for name, each in choose(Ten(), read_config(idle)).items()}["fc2"] == 8


def test_a_rule_may_name_another_algorithm() -> None:
    config = RTNConfig().set_local("fc3", GPTQConfig(bits=8))
    made = quantize(Ten(), config, lambda model: model(torch.randn(32, 16)))
    assert (made.fc3.algorithm, made.fc4.algorithm) == ("gptq", "rtn")


@pytest.mark.parametrize(
    ("pattern", "words"), [("blocks.0.upp", "nearest: blocks.0.up"), ("up(", r"not a regular expression")]
)
def test_rules_that_match_nothing_are_refused(pattern: str, words: str) -> None:
    model, config = Plain(), RTNConfig().set_local(pattern, rule(8))
    with pytest.raises(ValueError, match=words):
        prepare(model, config)
    assert "_bitwright_preparation" not in model.__dict__


def test_a_rule_for_a_head_that_does_not_exist_is_harmless() -> None:
    assert len(bits(RTNConfig().set_local("lm_head", RTNConfig(dtype="fp32")), Plain())) == 8


def test_nothing_to_quantize_is_said() -> None:
    with pytest.raises(Exception, match="BW313"):
        prepare(Ten(), RTNConfig(dtype="fp32"))
