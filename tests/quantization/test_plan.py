"""Which layer gets which scheme, in which format: overrides, groups, fallbacks, and what it will take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bitwright.core.errors import BitwrightError
from bitwright.core.recipe import Recipe, parse_override
from bitwright.core.scheme_names import parse
from bitwright.models.loading import load
from bitwright.quantization.api import quantize
from bitwright.quantization.plan import Plan, make_plan
from bitwright.quantization.sources import MemorySource
from tests.quantization.tiny import FAMILIES, Plain, build_model, file_tensors


def plan_of(model: nn.Module, scheme: str = "w4g32", *overrides: str, **arguments: Any) -> Plan:
    rules = tuple(map(parse_override, overrides))
    recipe = Recipe(scheme=parse(scheme), overrides=rules)
    return make_plan(MemorySource(model), recipe, **({"format": None, "group_fallback": "error"} | arguments))


def schemes(plan: Plan) -> dict[str, str]:
    return {name: scheme.name for name, scheme in plan.schemes.items()}


class Numbered(nn.Module):
    """Layers called fc1 to fc12 in one block."""

    def __init__(self) -> None:
        super().__init__()
        block = nn.Module()
        for number in range(1, 13):
            block.add_module(f"fc{number}", nn.Linear(32, 32))
        self.blocks = nn.ModuleList([block])


def test_patterns_match_whole_names() -> None:  # W12
    found = schemes(plan_of(Numbered(), "w4g32", r"blocks\.0\.fc1=w8"))
    assert found["blocks.0.fc1"] == "w8" and {found[f"blocks.0.fc{n}"] for n in range(2, 13)} == {"w4g32"}
    found = schemes(plan_of(Numbered(), "w4g32", r".*fc1.*=w8"))
    assert {name for name, scheme in found.items() if scheme == "w8"} == {f"blocks.0.fc{n}" for n in (1, 10, 11, 12)}
    with pytest.raises(BitwrightError, match="BW208"):
        plan_of(Numbered(), "w4g32", "fc1=w8")  # part of a name only


def test_type_rules_yield_to_name_rules_and_these_to_exact_names() -> None:
    rules = ["blocks.0.fc1=w2", ".*fc1=w8", "type:Linear=w3", r".*fc\d=w5", ".*fc2=w6"]
    found = schemes(plan_of(Numbered(), "w4g32", *rules))
    assert found["blocks.0.fc1"] == "w2"  # exact, although others come later
    assert found["blocks.0.fc2"] == "w6" and found["blocks.0.fc3"] == "w5"  # the last match wins
    assert found["blocks.0.fc10"] == "w3"  # of its type only
    again = schemes(plan_of(Numbered(), "w4g32", *reversed(rules)))
    assert again["blocks.0.fc1"] == "w2" and again["blocks.0.fc2"] == "w5" and again["blocks.0.fc10"] == "w3"


def test_layers_can_be_left_in_floating_point(tmp_path: Path) -> None:
    model = build_model("llama")
    plan = plan_of(model, "w4g32", ".*o_proj=float", "type:Linear=w8", ".*layers.1.*=float")
    assert not [name for name in plan.schemes if name.endswith("o_proj") or ".1." in name]
    assert set(plan.skipped) == {"lm_head", "model.layers.0.self_attn.o_proj"} | {
        name for name, module in model.named_modules() if ".1." in name and isinstance(module, nn.Linear)
    }
    assert {scheme.name for scheme in plan.schemes.values()} == {"w8"}
    report = quantize(model, tmp_path / "out", scheme="w4g32", overrides=[".*o_proj=float", ".*layers.1.*=float"])
    stored = file_tensors(tmp_path / "out")
    for name in report.unquantized:
        assert torch.equal(stored[f"{name}.weight"], model.get_submodule(name).weight)
    assert load(tmp_path / "out")(torch.arange(5)[None]).logits.shape == (1, 5, 32)
    with pytest.raises(BitwrightError) as caught:
        plan_of(model, "w4g32", "type:Linear=float")
    assert caught.value.code == "BW313" and "overrides" in caught.value.suggestion


@pytest.mark.parametrize("rule", ["model.layers.0.self_attn.q_porj=w8", "type:Conv2D=w8", ".*expert.*=float"])
def test_an_override_that_matches_nothing_names_what_is_near(rule: str) -> None:
    with pytest.raises(BitwrightError) as caught:
        plan_of(build_model("llama"), "w4g32", rule)
    assert caught.value.code == "BW208" and rule.split("=")[0].removeprefix("type:") in caught.value.what
    if "q_porj" in rule:
        assert "model.layers.0.self_attn.q_proj" in caught.value.suggestion
    if "type:" in rule:
        assert "Linear" in caught.value.suggestion


def test_an_override_of_an_embedding_says_that_none_is_quantized() -> None:
    for rule in ("model.embed_tokens=w8", "type:Embedding=w8", ".*embed.*=float"):
        with pytest.raises(BitwrightError) as caught:
            plan_of(build_model("llama"), "w4g32", rule)
        assert caught.value.code == "BW208" and "embeddings are never quantized" in caught.value.why
        assert caught.value.suggestion.startswith("nearest: ")


def test_an_override_of_a_layer_outside_the_blocks_is_not_ignored() -> None:
    """OPT projects between its embedding and its blocks: such layers are not quantized, and asking for it says so."""
    model = build_model("opt", word_embed_proj_dim=16)
    plan = plan_of(model)
    assert {"model.decoder.project_in", "model.decoder.project_out"} <= set(plan.skipped)
    with pytest.raises(BitwrightError) as caught:
        plan_of(model, "w4g32", "model.decoder.project_in=w8")
    assert caught.value.code == "BW208" and "project_in" in caught.value.what
    assert "outside" in caught.value.why
    plan_of(model, "w4g16", "type:Linear=w8")  # matches layers inside too
    plan_of(model, "w4g16", "model.decoder.project_in=float")  # as it is anyway


@pytest.mark.parametrize("family", ["biogpt", "electra"])
def test_a_head_of_another_name_is_left_alone_by_default(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, family, FAMILIES["llama"] | {"embedding_size": 32})
    model = build_model(family, is_decoder=True)
    heads = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    assert heads and heads[0] not in ("lm_head",)
    assert heads[0] not in plan_of(model).schemes and heads[0] in plan_of(model).skipped
    assert schemes(plan_of(model, "w4g32", f"{heads[0]}=w8"))[heads[0]] == "w8"


def test_a_layer_of_a_block_is_no_head_whatever_its_name() -> None:
    model = Plain(32, blocks=2)
    for block in model.blocks:
        block.output_layer = nn.Linear(32, 32)
    assert {"blocks.0.output_layer", "blocks.1.output_layer"} <= plan_of(model).schemes.keys()


def test_a_type_rule_does_not_reach_the_head() -> None:
    model = build_model("llama")
    assert "lm_head" not in plan_of(model, "w4g32", "type:Linear=w8").schemes
    assert "lm_head" in plan_of(model, "w4g32", ".*head=w8").schemes


class Uneven(nn.Module):
    """Blocks with layers of 64 and 96 input features, and one of 70."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList()
        for _ in range(2):
            block = nn.Module()
            for width in (64, 96, 70):
                block.add_module(f"in{width}", nn.Linear(width, 32))
            self.blocks.append(block)


def test_groups_that_do_not_divide_are_refused_with_layers_and_divisors() -> None:
    with pytest.raises(BitwrightError) as caught:
        plan_of(Uneven(), "w4g64", ".*in70=float")
    error = caught.value
    assert error.code == "BW204" and error.exit_status == 2
    assert "2 layers" in error.what and "blocks.0.in96" in error.what and "in64" not in error.what
    assert "96" in error.why
    assert "32, 16" in error.suggestion and "64," not in error.suggestion
    assert "--group-fallback" in error.suggestion
    with pytest.raises(BitwrightError) as caught:
        plan_of(Uneven(), "w4g32")
    assert "none of the usual ones" in caught.value.suggestion and "in70" in caught.value.what
    plan_of(Uneven(), "w4g32", ".*in70=w4g35")  # an override may settle it
    plan_of(Uneven(), "w4")


def test_groups_along_the_output_features_are_checked_there() -> None:
    plan_of(Uneven(), "w4g32-axis0")  # every layer has 32 outputs
    with pytest.raises(BitwrightError) as caught:
        plan_of(Uneven(), "w4g64-axis0")
    assert "their grouped dimension is 32" in caught.value.why
    assert "32, 16" in caught.value.suggestion


@pytest.mark.parametrize("fallback", ["pad", "per-channel", "skip"])
def test_each_fallback_does_what_it_says_aloud(tmp_path: Path, fallback: str) -> None:
    model = build_model("llama", hidden_size=48, num_attention_heads=4, head_dim=12)  # 48 is no multiple of 32
    report = quantize(model, tmp_path / "out", scheme="w4g32", group_fallback=fallback)  # type: ignore[arg-type]
    (notice,) = [notice for notice in report.notices if "group size" in notice]
    assert "12 layers" in notice and "q_proj" in notice
    q, down = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
    assert report.layers[down]["scheme"] == "w4g32"
    if fallback == "skip":
        assert q not in report.layers and q in report.unquantized and "floating point" in notice
    else:
        assert report.layers[q]["scheme"] == ("w4g32" if fallback == "pad" else "w4")
    assert report.format == ("native" if fallback == "pad" else "compressed-tensors")
    if fallback == "pad":
        scale = file_tensors(tmp_path / "out")[f"{q}.scale"]
        assert scale.shape == (48, 2)  # a whole group and a shorter one
    assert load(tmp_path / "out")(torch.arange(5)[None]).logits.shape == (1, 5, 32)


def test_the_first_format_that_can_store_every_layer_is_chosen() -> None:
    model = build_model("llama")
    assert plan_of(model).format.name == "compressed-tensors"
    assert plan_of(model, "w4g32-asym", "lm_head=w8a8").format.name == "compressed-tensors"
    for scheme in ("nf4g32", "w4g32-dq", "A16W4", "w1g32", "w4g16-axis0"):
        assert plan_of(model, scheme).format.name == "native", scheme
    assert plan_of(model, "w4g32", ".*down_proj=nf4g32").format.name == "native"
    assert plan_of(build_model("gpt2")).format.name == "native"
    assert plan_of(model, format="native").format.name == "native"


@pytest.mark.parametrize(("scheme", "reason"), [("nf4g32", "nf4"), ("w4g32-dq", "double"), ("A16W4", "whole numbers")])
def test_a_format_that_cannot_store_the_scheme_says_why(scheme: str, reason: str) -> None:
    with pytest.raises(BitwrightError) as caught:
        plan_of(build_model("llama"), scheme, format="compressed-tensors")
    assert caught.value.code == "BW205" and reason in caught.value.what and "native" in caught.value.suggestion
    assert "model.layers.0" in caught.value.what
    with pytest.raises(BitwrightError) as caught:
        plan_of(build_model("llama"), format="gguf")
    assert caught.value.exit_status == 2 and "native" in caught.value.render()


def test_units_hold_every_tensor_once() -> None:
    for family in ("llama", "qwen2", "gpt2", "opt"):
        model = build_model(family)
        for overrides in ((), ("lm_head=w8",)):
            plan = plan_of(model, "w4g32", *overrides)
            tensors = [tensor for unit in plan.units for tensor in unit.tensors]
            assert sorted(tensors) == sorted(name for name, _ in model.named_parameters())
            assert [layer for unit in plan.units for layer in unit.layers] == list(plan.schemes)
            assert [unit.name for unit in plan.units if unit.is_block] == list(plan.blocks.names())


class Outer(nn.Module):
    """A model whose own modules are called as the units that are no blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.outer = Plain(32, blocks=2)
        self.head = nn.Linear(8, 4)


def test_modules_called_outer_and_head_confuse_nothing(tmp_path: Path) -> None:
    model = Outer()
    plan = plan_of(model)
    assert [layer for unit in plan.units for layer in unit.layers] == list(plan.schemes) and len(plan.schemes) == 4
    quantize(model, tmp_path / "out", scheme="w4g32")
    stored = file_tensors(tmp_path / "out")
    assert torch.equal(stored["head.weight"], model.head.weight)
    assert "outer.blocks.0.up.weight" not in stored


@pytest.mark.parametrize("scheme", ["w4g32", "w8", "w3g32-asym", "nf4g32-dq", "w8a8", "w4a8", "A16W4", "w4g32-axis0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_size_that_is_promised_is_the_size_that_is_written(tmp_path: Path, scheme: str, dtype: torch.dtype) -> None:
    model = build_model("llama", dtype=dtype, hidden_size=128, intermediate_size=256)
    plan = plan_of(model, scheme, "lm_head=w8")
    quantize(model, tmp_path / "out", scheme=scheme, overrides=["lm_head=w8"])
    written = sum(tensor.numel() * tensor.element_size() for tensor in file_tensors(tmp_path / "out").values())
    assert abs(plan.output_bytes - written) < 0.02 * written
