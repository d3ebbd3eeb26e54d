"""What reviews found in runs of several algorithms and in compositions: each fault once, so that it stays mended."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.core.errors import BitwrightError
from bitwright.core.recipe import Recipe, parse_override
from bitwright.core.scheme_names import parse
from bitwright.models.blocks import linear_weight
from bitwright.models.quantized import QuantizedLinear
from bitwright.quantization.algorithms import ALGORITHMS
from bitwright.quantization.api import quantize
from bitwright.quantization.events import Event
from bitwright.quantization.gptq import GPTQ
from bitwright.quantization.plan import make_plan
from bitwright.quantization.rtn import RTN, RtnOptions
from bitwright.quantization.session import convert, prepare
from bitwright.quantization.sources import MemorySource
from bitwright.quantization.stages import Algorithm, BlockTask, Stage
from tests.quantization.few_steps import few_steps
from tests.quantization.tiny import TEXT, Plain, build_model, save_model


def refusal(**changes: object) -> BitwrightError:
    with pytest.raises(BitwrightError) as caught:
        recipe = Recipe(scheme=parse("w4g32"), **changes)  # type: ignore[arg-type]
        make_plan(MemorySource(build_model("llama")), recipe, format=None, group_fallback="error")
    return caught.value


def test_equalizers_are_not_given_several_blocks_at_once() -> None:
    found = refusal(algorithm="autoround", options={"n_blocks": 2}, overrides=(parse_override(".*q_proj=w4g32@awq"),))
    assert found.code == "BW201" and "awq" in found.what and "n_blocks" in found.what


@pytest.mark.parametrize(("algorithm", "other"), [("gptq+learned", "autoround"), ("gptq+logits", "autoround+logits")])
def test_two_algorithms_do_not_tune_one_model(algorithm: str, other: str) -> None:
    found = refusal(algorithm=algorithm, overrides=(parse_override(f".*k_proj=w4g32@{other}"),))
    assert found.code == "BW201" and algorithm in found.what and other in found.what


def test_an_override_with_the_same_algorithm_keeps_its_options() -> None:
    rules = (parse_override(".*q_proj=w3g32@gptq"), parse_override(".*k_proj=w3g32@rtn"))
    recipe = Recipe(scheme=parse("w4g32"), algorithm="gptq", options={"act_order": True}, overrides=rules)
    same, other = (recipe.choice_for(name, "Linear") for name in ("a.q_proj", "a.k_proj"))
    assert same is not None and dict(same.options) == {"act_order": True}
    assert other is not None and other.algorithm == "rtn" and not other.options


@pytest.mark.parametrize(
    ("algorithm", "rule", "option"),
    [
        ("rotation+gptq", "rotation+gptq(heads=false)", "rotates the whole model"),
        ("gptq", "gptq(true_sequential=true)", "true_sequential is"),
        ("autoround", "autoround(n_blocks=2)", "n_blocks is"),
    ],
)
def test_options_that_concern_whole_blocks_are_the_same_for_all_layers(algorithm: str, rule: str, option: str) -> None:
    found = refusal(algorithm=algorithm, overrides=(parse_override(f".*k_proj=w4g32@{rule}"),))
    assert found.code == "BW201" and option in found.what and "k_proj" in found.what


def test_options_spelled_out_are_those_not_given() -> None:
    rules = tuple(map(parse_override, (".*q_proj=w4g32@autoround(n_blocks=1,iters=200)", ".*k_proj=w4g32@autoround")))
    recipe = Recipe(scheme=parse("w4g32"), algorithm="autoround", overrides=rules)
    plan = make_plan(MemorySource(build_model("llama")), recipe, format=None, group_fallback="error")
    assert len({id(method) for method in plan.methods.values()}) == 1


def test_bad_options_of_an_override_are_told_with_it(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    for rules, told in (
        ([".*q_proj=w4g32@hqq(dmp=1)"], "override '.*q_proj': hqq has no option 'dmp'"),
        ([".*q_proj=w4g32@nosuch", ".*q_proj=w8"], "override '.*q_proj': unknown algorithm 'nosuch'"),
        ([".*q_proj=w4g32@rtn(search=1)"], "override '.*q_proj': "),
        (
            [".*q_proj=w4g32@hqq(norm=0.5,hqq.norm=0.6)"],
            "override '.*q_proj': hqq: norm and hqq.norm are the same option",
        ),
    ):
        with pytest.raises(BitwrightError) as caught:
            quantize(tmp_path / "model", tmp_path / "out", scheme="w4g32", overrides=rules)
        assert caught.value.code == "BW201" and caught.value.what.startswith(told)
        assert not (tmp_path / "out").exists()


def test_an_option_has_one_value(tmp_path: Path) -> None:
    """By whichever of its names; an override's takes the place of the run's."""
    save_model(tmp_path / "model", "llama")
    given: dict[str, Any] = {"algorithm": "hqq", "scheme": "w4g32-asym", "options": {"hqq.iterations": 3}}
    with pytest.raises(BitwrightError, match=r"hqq\.iterations and iterations are the same option"):
        quantize(tmp_path / "model", tmp_path / "out", **given | {"options": {"hqq.iterations": 3, "iterations": 4}})
    rule = parse_override(".*q_proj=w4g32-asym@hqq(iterations=5)")
    recipe = Recipe(scheme=parse("w4g32-asym"), algorithm="hqq", options=given["options"], overrides=(rule,))
    methods = make_plan(MemorySource(build_model("llama")), recipe, format=None, group_fallback="error").methods
    found = {name.rpartition(".")[2]: method.options["hqq"].iterations for name, method in methods.items()}
    assert found["q_proj"] == 5 and found["k_proj"] == 3


def test_the_plan_and_the_card_show_the_options_of_overrides(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    rules = [".*q_proj=w4g32@hqq(iterations=3)", ".*k_proj=w4g32@rtn(search=true)", ".*v_proj=w4g32@rtn(search=false)"]
    events: list[Event] = []
    quantize(tmp_path / "model", tmp_path / "out", scheme="w4g32", overrides=rules, on_event=events.append)
    listed = next(event.data["overrides"] for event in events if event.kind == "plan")
    assert [how.partition(" by ")[2] for how in listed] == ["hqq(iterations=3)", "rtn(search=true)"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "`.*q_proj` → w4g32 by hqq with iterations=3" in card and "by rtn with search=false" in card


def test_the_plan_tells_options_of_two_stages_apart(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    (tmp_path / "text").write_text(TEXT)
    rules = [f".*{name}_proj=w8@awq+gptq({stage}.range=full)" for name, stage in (("q", "awq"), ("k", "gptq"))]
    run: dict[str, Any] = {"scheme": "w4g32", "algorithm": "awq+gptq", "calibration": tmp_path / "text"}
    events: list[Event] = []
    sizes = {"samples": 2, "seqlen": 16}
    quantize(tmp_path / "model", tmp_path / "out", overrides=rules, on_event=events.append, **run, **sizes)
    listed = next(event.data["overrides"] for event in events if event.kind == "plan")
    assert [how.partition("(")[2] for how in listed] == ['awq.range="full")', 'gptq.range="full")']


def test_the_report_says_what_an_algorithm_leaves_out_at_the_head(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    (tmp_path / "text").write_text(TEXT)
    run = {"calibration": tmp_path / "text", "samples": 4, "seqlen": 16, "overrides": ["lm_head=w8"]}
    report = quantize(tmp_path / "model", tmp_path / "out", scheme="w4g32", algorithm="awq", **run)  # type: ignore[arg-type]
    head = report.layers["lm_head"]
    assert head["rounded_by"] == "rtn" and "blocks" in head["reason"]


def test_layers_whose_inputs_are_multiplied_differently_have_statistics_of_their_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Two readers of one input, of which only the first is scaled."""
    power: dict[str, Tensor] = {}

    def scale_first(task: BlockTask, options: RtnOptions) -> Mapping[str, Tensor]:
        name = next(name for name in task.layers if name.endswith("first"))
        vector = 1.0 + torch.arange(32)
        linear_weight(task.layers[name]).div_(vector)
        return {name: vector}

    def look(task: BlockTask, tensors: Mapping[str, object], options: RtnOptions) -> Mapping[str, object]:
        power.update({name: entry.sum_of_squares for name, entry in task.statistics.items()})
        return tensors

    row = Algorithm(
        equalize=(Stage("scale", RtnOptions, scale_first),),
        round=RTN,
        tune=(Stage("look", RtnOptions, look),),  # type: ignore[arg-type]
        calibrated=True,
    )
    monkeypatch.setitem(ALGORITHMS, "toy", row)
    model = Plain(32)
    for block in model.blocks:
        block.up = Twins(32)
    prepared = prepare(model, scheme="w4g32", algorithm="toy")
    prepared(torch.randn(6, 8))
    convert(prepared)
    first, second = (power[f"blocks.0.up.{name}"] for name in ("first", "second"))
    torch.testing.assert_close(first, second * (1.0 + torch.arange(32)).double().square(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("algorithm", [name for name, row in ALGORITHMS.items() if row.calibrated])
def test_codes_do_not_depend_on_how_texts_are_put_into_batches(algorithm: str) -> None:
    ids = torch.randint(0, 32, (8, 16), generator=torch.Generator().manual_seed(3))
    made = []
    for size in (1, 8):
        prepared = prepare(build_model("llama"), scheme="w3g32-asym", algorithm=algorithm, options=few_steps(algorithm))
        for batch in ids.split(size):
            prepared(input_ids=batch)
        layers = [module for module in convert(prepared).modules() if isinstance(module, QuantizedLinear)]
        made.append(torch.cat([layer.unpack().codes.flatten() for layer in layers]))
    assert torch.equal(*made)


@torch.no_grad()
def test_inputs_are_multiplied_while_sites_are_rounded_in_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """By powers of two, which change no bit: the codes are those without, and two equalizers multiply by both."""

    def double(task: BlockTask, options: RtnOptions) -> Mapping[str, Tensor]:
        name = next(name for name in task.layers if name.endswith("up"))
        linear_weight(task.layers[name]).div_(2)
        return {name: torch.full((32,), 2.0)}

    stages = tuple(Stage(name, NoOptions, double) for name in ("once", "twice"))
    monkeypatch.setitem(ALGORITHMS, "doubled", Algorithm(equalize=stages, round=GPTQ, calibrated=True, with_gram=True))
    x, made = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), {}
    for algorithm in ("gptq", "doubled"):
        prepared = prepare(Plain(32), scheme="w2g16-sf32", algorithm=algorithm, options={"true_sequential": True})
        prepared(x)
        made[algorithm] = convert(prepared)
    for name, module in made["gptq"].named_modules():
        if isinstance(module, QuantizedLinear):
            other = made["doubled"].get_submodule(name)
            assert isinstance(other, QuantizedLinear)
            assert torch.equal(module.unpack().codes, other.unpack().codes), name
            assert (other.input_scale is None) == name.endswith("down")
            assert other.input_scale is None or torch.equal(other.input_scale, torch.full((32,), 4.0))
    assert torch.equal(made["gptq"](x), made["doubled"](x))


@dataclass(frozen=True)
class NoOptions:
    """Nothing to choose."""


@torch.no_grad()
def test_a_tuner_works_on_what_was_rounded_in_sequence() -> None:
    """The float layers are back in the block when its turn comes."""
    x, model = torch.randn(64, 8, generator=torch.Generator().manual_seed(0)), Plain(32)
    errors = {}
    for algorithm in ("gptq", "gptq+learned"):
        prepared = prepare(model, scheme="w2g16-asym", algorithm=algorithm, options={"true_sequential": True})
        prepared(x)
        errors[algorithm] = float((convert(prepared)(x) - model(x)).square().mean())
    assert errors["gptq+learned"] < 0.8 * errors["gptq"]


class Twins(nn.Module):
    """Two layers that read one input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) + self.second(x)


@pytest.mark.parametrize("algorithm", ["autoround", "gptq+learned", "gptq"])
def test_a_block_whose_output_is_not_finite_is_named(algorithm: str) -> None:
    """In float16, where the last block's sum is beyond the largest number."""
    model = Plain(32).half()
    torch.nn.init.constant_(model.blocks[2].down.weight, 300.0)
    torch.nn.init.constant_(model.blocks[2].up.bias, 300.0)
    prepared = prepare(model, scheme="w4g32", algorithm=algorithm, options=few_steps(algorithm))
    prepared(torch.ones(4, 8).half())
    with pytest.raises(BitwrightError) as caught:
        convert(prepared)
    assert caught.value.code == "BW601" and "blocks.2" in caught.value.what


@pytest.mark.parametrize(
    ("algorithm", "scheme", "options"),
    [
        ("autoround", "nf4g32", {}),
        ("hqq", "nf4g32", {}),
        ("gptq", "w8g32", {"fp8_aware": True}),
        ("rtn", "w4g32-asym", {"range": "full"}),
        ("rtn", "nf4g32", {"range": "centred"}),
        ("gptq", "w1g32", {"range": "full"}),
        ("gptq", "w4g32-asym", {"range": "centred"}),
        ("awq", "w4g32-asym", {"awq.range": "full"}),
        ("teq", "nf4g32", {"teq.range": "centred"}),
        ("autoround", "w4g32-asym", {"full_range": True}),
    ],
)
def test_what_an_algorithm_cannot_make_is_refused_in_the_plan(
    algorithm: str, scheme: str, options: dict[str, object]
) -> None:
    recipe = Recipe(scheme=parse(scheme), algorithm=algorithm, options=options)
    with pytest.raises(BitwrightError, match=f"{algorithm} cannot use {scheme}, the scheme of model.layers.0"):
        make_plan(MemorySource(build_model("llama")), recipe, format=None, group_fallback="error")


def test_one_sample_is_too_few_to_train_and_judge_by_logits(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    (tmp_path / "text").write_text(TEXT)
    with pytest.raises(BitwrightError, match="two calibration samples"):
        run = {"calibration": tmp_path / "text", "samples": 1, "seqlen": 16}
        quantize(tmp_path / "model", tmp_path / "out", scheme="w4g32", algorithm="gptq+logits", **run)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()
