"""Algorithms of several stages, several algorithms in one model, and what the stream does around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.recipe import Override, Recipe, parse_override
from bitwright.core.scheme import QuantScheme
from bitwright.core.scheme_names import parse
from bitwright.models.blocks import find_blocks, linear_weight, linears, set_module
from bitwright.models.hf import load_tokenizer
from bitwright.models.loading import load
from bitwright.models.quantized import QuantizedLinear
from bitwright.quantization.algorithms import ALGORITHMS, parse_options
from bitwright.quantization.api import quantize
from bitwright.quantization.calibration import cut_windows, tokenize
from bitwright.quantization.events import Stopped
from bitwright.quantization.plan import make_plan
from bitwright.quantization.session import convert, prepare, quantize_module
from bitwright.quantization.sources import MemorySource
from bitwright.quantization.stages import Algorithm, BlockTask, Stage
from bitwright.quantization.statistics import SiteStatistics
from tests.models.architectures import MIXTURE, build, sample_ids
from tests.quantization.tiny import TEXT, digests, file_tensors, save_model

SAMPLES, SEQLEN, SEED = 4, 12, 3


@dataclass(frozen=True)
class Sequential:
    """Options of the toy rounder."""

    true_sequential: bool = False
    n_blocks: int = 1
    damp: float = 0.1


@dataclass(frozen=True)
class Damped:
    """Options of a second stage that has a field of the same name."""

    damp: float = 0.2
    steps: int | None = None


@dataclass
class Toy:
    """A rounder to nearest that notes what it was given, as an algorithm called ``name``."""

    name: str
    monkeypatch: pytest.MonkeyPatch
    rounded: list[tuple[Tensor, SiteStatistics | None]] = field(default_factory=list)
    tasks: list[BlockTask] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def round(
        self, weight: Tensor, statistics: SiteStatistics | None, scheme: QuantScheme, options: Sequential
    ) -> QuantizedTensor:
        self.rounded.append((weight.detach().clone(), statistics))
        return QuantizedTensor.quantize(weight, scheme)

    def tune(self, task: BlockTask, tensors: Mapping[str, QuantizedTensor], options: Damped) -> Any:
        self.tasks.append(task)
        self.outputs.extend([task.run(0)] if task.inputs else [])
        return tensors

    def register(self, **changes: Any) -> Toy:
        row = {"round": Stage("toy", Sequential, self.round), "tune": (Stage("tuned", Damped, self.tune),)}
        self.monkeypatch.setitem(ALGORITHMS, self.name, Algorithm(**{"calibrated": True, **row, **changes}))
        return self


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Toy]:
    return lambda name="toy", **changes: Toy(name, monkeypatch).register(**changes)


@pytest.fixture(params=["llama", "gpt2"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_model(tmp_path / "model", request.param, num_hidden_layers=3)
    (tmp_path / "text").write_text(TEXT)
    return tmp_path


def run(place: Path, output: str = "out", **changes: Any) -> Path:
    arguments: dict[str, Any] = {"samples": SAMPLES, "seqlen": SEQLEN, "seed": SEED, "scheme": "w3g32"}
    arguments |= {"calibration": place / "text", "format": "native", "algorithm": "toy", **changes}
    quantize(place / "model", place / output, **arguments)
    return place / output


def windows(place: Path) -> Tensor:
    ids = tokenize(load_tokenizer(place / "model"), TEXT)
    return cut_windows(ids, samples=SAMPLES, seqlen=SEQLEN, seed=SEED, source="text").windows


@torch.no_grad()
def power(model: torch.nn.Module, name: str, ids: Tensor) -> Tensor:
    """Sum of squares (float64 ``[in]``) of what the layer ``name`` reads when the whole model runs each window."""
    total: list[Tensor] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, x: total.append(x[0].double().flatten(0, -2).square().sum(0)))
    for window in ids:
        model(input_ids=window[None], use_cache=False)
    hook.remove()
    return torch.stack(total).sum(0)


def test_options_are_given_by_field_or_by_stage_and_field(toy: Callable[..., Toy]) -> None:
    toy()
    given = parse_options("toy", {"true_sequential": True, "toy.damp": 1, "steps": 3})
    assert given == {"toy": Sequential(true_sequential=True, damp=1.0), "tuned": Damped(steps=3)}
    assert type(given["toy"].damp) is float


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"damp": 0.5}, "toy.damp, tuned.damp"),
        ({"dump": 0.5}, "toy.damp"),
        ({"other.damp": 0.5}, "tuned.steps"),
        ({"steps": 1.5}, "int or null"),
        ({"true_sequential": 1}, "a bool"),
        ({"toy.damp": True}, "a float"),
    ],
)
def test_options_that_cannot_be_placed_are_refused(toy: Callable[..., Toy], values: Any, named: str) -> None:
    toy()
    with pytest.raises(BitwrightError) as caught:
        parse_options("toy", values)
    assert caught.value.code == "BW201" and named in caught.value.suggestion


def test_layers_may_have_algorithms_of_their_own(place: Path, toy: Callable[..., Toy]) -> None:
    first, second = toy("first", tune=()), toy("second")
    layer = "self_attn.o_proj" if (place / "model/config.json").read_text().count("llama") else "attn.c_proj"
    rules = [f".*{layer}=w4g32@second", Override(pattern=r".*\.1\..*mlp.*", scheme=None)]
    output = run(place, algorithm="first", overrides=rules)
    model = load(place / "model")
    blocks = find_blocks(model)
    names = [
        name for prefix, block in zip(blocks.names(), blocks.modules, strict=True) for name in linears(block, prefix)
    ]
    own = [name for name in names if name.endswith(layer)]
    rest = [name for name in names if (name not in own and ".1." not in name) or (".1." in name and "mlp" not in name)]
    rest = [name for name in rest if name not in own]
    assert len(second.rounded) == len(own) == 3 and len(first.rounded) == len(rest)
    for found, wanted in ((second, own), (first, rest)):
        for (weight, _), name in zip(found.rounded, wanted, strict=True):
            assert torch.equal(weight, linear_weight(model.get_submodule(name)))
    assert [tuple(task.layers) for task in second.tasks] == [(name,) for name in own]
    tensors = file_tensors(output)
    scale = {name: tensor for name, tensor in tensors.items() if name.endswith(".scale")}
    assert len(scale) == len(own) + len(rest)
    stopped = 0
    while stopped < 20:
        try:
            resumed = run(place, "again", algorithm="first", overrides=rules, should_stop=lambda: True)
            break
        except Stopped:
            stopped += 1
    assert digests(resumed) == digests(output)


def test_an_override_names_its_algorithm() -> None:
    rule = parse_override(r".*down_proj=w8g32@gptq")
    assert (rule.pattern, rule.scheme, rule.algorithm) == (r".*down_proj", parse("w8g32"), "gptq")
    for wrong in ("a=w4@", "a=float@gptq", "a=w4@gptq(", "a=w4@gptq(damp)", "a=w4@(search=true)", "a=w4@gptq()x"):
        with pytest.raises(BitwrightError, match="BW201"):
            parse_override(wrong)


def test_in_true_sequence_a_site_sees_rounded_predecessors(place: Path, toy: Callable[..., Toy]) -> None:
    """Against whole-model forwards in which the layers that ran before are replaced one site at a time."""
    seen = toy()
    run(place, options={"true_sequential": True})
    plain = toy()
    run(place, "plain")
    model, ids = load(place / "model"), windows(place)
    block, name = find_blocks(model).modules[0], find_blocks(model).names()[0]
    given = dict(zip((id_of(weight) for weight, _ in seen.rounded), seen.rounded, strict=True))
    before = dict(zip((id_of(weight) for weight, _ in plain.rounded), plain.rounded, strict=True))
    different = 0
    layers = linears(block, name)
    for layer, module in layers.items():
        _, statistics = given[id_of(linear_weight(module))]
        assert statistics is not None
        torch.testing.assert_close(statistics.sum_of_squares, power(model, layer, ids), rtol=1e-4, atol=1e-6)
        other = before[id_of(linear_weight(module))][1]
        assert other is not None
        different += not torch.allclose(statistics.sum_of_squares, other.sum_of_squares, rtol=1e-6)
        if layer.rpartition(".")[2] not in ("q_proj", "k_proj", "gate_proj"):  # the last of a site: round the site
            readers = {"v_proj": ("q_proj", "k_proj", "v_proj"), "up_proj": ("gate_proj", "up_proj")}
            leaf = layer.rpartition(".")[2]
            for reader in readers.get(leaf, (leaf,)):
                full = layer.removesuffix(leaf) + reader
                tensor = QuantizedTensor.quantize(linear_weight(layers[full]), parse("w3g32").weight)
                bias = layers[full].bias if isinstance(layers[full].bias, Tensor) else None
                set_module(model, full, QuantizedLinear.build(tensor, bias, parse("w3g32")))
    assert different >= 2  # all sites but the first


def id_of(weight: Tensor) -> float:
    return float(weight.double().flatten()[:7].sum())


def test_the_output_head_is_rounded_on_what_it_reads(place: Path, toy: Callable[..., Toy]) -> None:
    seen = toy(with_gram=True)
    output = run(place, overrides=["lm_head=w4g32"])
    weight, statistics = seen.rounded[-1]
    model = load(place / "model")
    assert torch.equal(weight, model.lm_head.weight) and statistics is not None and statistics.gram is not None
    quantized = load(output)
    assert statistics.tokens == SAMPLES * SEQLEN
    torch.testing.assert_close(
        statistics.sum_of_squares, power(quantized, "lm_head", windows(place)), rtol=1e-4, atol=1e-6
    )


@pytest.mark.parametrize("in_memory", [False, True], ids=["streamed", "in memory"])
def test_tuners_are_given_the_float_models_hidden_states(place: Path, toy: Callable[..., Toy], in_memory: bool) -> None:
    seen, ids = toy(with_float_flow=True), windows(place)
    model = load(place / "model")
    if in_memory:
        prepared = prepare(model, scheme="w3g32", algorithm="toy")
        for window in ids:
            prepared(input_ids=window[None])
        convert(prepared)
    else:
        run(place)
    assert len(seen.tasks) == 3
    for task in seen.tasks:
        entering: list[Tensor] = []

        def note(_: object, arguments: tuple[Tensor, ...], keywords: Any, entering: list[Tensor] = entering) -> None:
            entering.append(arguments[0] if arguments else keywords["hidden_states"])

        hook = model.get_submodule(task.name).register_forward_pre_hook(note, with_kwargs=True)
        with torch.no_grad():
            for window in ids:
                model(input_ids=window[None], use_cache=False)
        hook.remove()
        for found, wanted in zip(task.reference_inputs, entering, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(seen.tasks[2].inputs[0], seen.tasks[2].reference_inputs[0], rtol=1e-3, atol=1e-4)


def test_an_interrupted_run_with_two_flows_is_resumed_to_the_same_bytes(place: Path, toy: Callable[..., Toy]) -> None:
    def jitter(task: BlockTask, tensors: Mapping[str, QuantizedTensor], options: Damped) -> Any:
        gap = sum(float((a - b).abs().sum()) for a, b in zip(task.inputs, task.reference_inputs, strict=True))
        chosen = torch.Generator().manual_seed(int(gap * 1e4))
        flip = {n: torch.rand(t.codes.shape, generator=chosen) < 0.2 for n, t in tensors.items()}
        parts = {n: (t.scale, t.zero) for n, t in tensors.items()}
        codes = {n: torch.where(flip[n], 0, t.codes) for n, t in tensors.items()}
        return {
            n: QuantizedTensor(scheme=t.scheme, codes=codes[n], scale=parts[n][0], zero=parts[n][1])
            for n, t in tensors.items()
        }

    toy(with_float_flow=True, tune=(Stage("tuned", Damped, jitter),))
    whole, stopped = run(place, "whole"), 0
    while stopped < 20:
        try:
            resumed = run(place, should_stop=lambda: True)
            break
        except Stopped:
            stopped += 1
    assert stopped == 3 and digests(resumed) == digests(whole)


def test_several_blocks_are_worked_on_together(place: Path, toy: Callable[..., Toy]) -> None:
    seen = toy()
    output = run(place, options={"n_blocks": 2})
    names = find_blocks(load(place / "model")).names()
    assert [task.name for task in seen.tasks] == [f"{names[0]}-1", names[2]]
    first, last = seen.tasks
    assert [name.startswith(names[1]) for name in first.layers].count(True) == len(first.layers) // 2
    assert torch.allclose(seen.outputs[0], last.inputs[0], rtol=0.5, atol=0.5)  # of two blocks, not yet quantized
    one = run(place, "one", algorithm="rtn")
    assert {n: t.sum() for n, t in file_tensors(one).items()} == {n: t.sum() for n, t in file_tensors(output).items()}


def test_what_cannot_be_folded_multiplies_the_input(place: Path, toy: Callable[..., Toy]) -> None:
    """An equalizer that halves some columns: the float outputs stay, and so does what is stored and loaded."""
    multipliers: dict[str, Tensor] = {}

    def halve(task: BlockTask, options: Damped) -> Mapping[str, Tensor]:
        before = task.run(0)
        for name, layer in task.layers.items():
            weight = linear_weight(layer)
            multipliers[name] = 2.0 ** (torch.arange(weight.shape[1]) % 3)
            weight.div_(multipliers[name])
        found = {name: multipliers[name] for name in task.layers}
        assert not torch.allclose(task.run(0), before)
        return found

    seen = toy(equalize=(Stage("halve", Damped, halve),))
    output = run(place, scheme="w8g32")
    assert {name: t for name, t in file_tensors(output).items() if name.endswith("input_scale")}.keys() == {
        f"{name}.input_scale" for name in multipliers
    }
    quantized, model, ids = load(output), load(place / "model"), windows(place)
    with torch.no_grad():
        torch.testing.assert_close(quantized(ids).logits, model(ids).logits, rtol=0.05, atol=0.2)
    names = [name for task in seen.tasks for name in task.layers]
    for (_, statistics), name in zip(seen.rounded, names, strict=True):
        assert statistics is not None
        multiplied = power(quantized, name, ids) * multipliers[name].double().square()
        torch.testing.assert_close(statistics.sum_of_squares, multiplied, rtol=0.2, atol=1e-2)


def test_an_expert_that_saw_no_token_is_rounded_to_nearest_and_reported(
    toy: Callable[..., Toy], tmp_path: Path
) -> None:
    seen = toy()
    model = build(MIXTURE)
    expert = model.model.layers[1].mlp
    assert isinstance(expert.gate.weight, Tensor)
    with torch.no_grad():
        expert.gate.weight.zero_()  # every token goes to the same experts
    prepared = prepare(model, scheme="w4g32", algorithm="toy")
    for row in sample_ids():
        prepared(input_ids=row[None])
    quantized = convert(prepared)
    layers = {name for name, module in quantized.named_modules() if isinstance(module, QuantizedLinear)}
    given = {name for task in seen.tasks for name in task.statistics}
    absent = layers - given
    assert absent and len(seen.rounded) == len(layers - absent)
    assert all(".experts." in name for name in absent)
    for name in absent:
        source = linear_weight(model.get_submodule(name))
        expected = QuantizedTensor.quantize(source, parse("w4g32").weight)
        assert torch.equal(quantized.get_submodule(name).unpack().codes, expected.codes)


def test_quantizing_a_module_in_memory_to_disk_leaves_the_module_alone(place: Path, toy: Callable[..., Toy]) -> None:
    def spoil(task: BlockTask, options: Damped) -> Mapping[str, Tensor]:
        for layer in task.layers.values():
            linear_weight(layer).mul_(3)
        return {}

    toy(equalize=(Stage("spoil", Damped, spoil),), calibrated=False)
    model = load(place / "model")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    quantize(model, place / "out", scheme="w3g32", algorithm="toy", format="native")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    scales = [tensor for name, tensor in file_tensors(place / "out").items() if name.endswith(".scale")]
    plain = quantize_module(model, scheme="w3g32")
    expected = [m.unpack().scale for m in plain.modules() if isinstance(m, QuantizedLinear)]
    total = partial(sum, start=0.0)
    assert total(float(s.sum()) for s in scales) == pytest.approx(3 * total(float(s.sum()) for s in expected), rel=1e-2)


@dataclass(frozen=True)
class Reordering:
    """Options of a rounder that may move columns between groups."""

    reorders: bool = True


@pytest.mark.parametrize(
    ("scheme", "wanted", "expected"),
    [
        ("w4g32", None, "gptq"),
        ("w4", None, "compressed-tensors"),
        ("w4g32", "compressed-tensors", "consecutive"),
        ("w4g32-asym", "awq", "consecutive"),
        ("nf4g32", None, "native"),
    ],
)
def test_groups_that_are_no_runs_of_columns_go_where_they_can_be_stored(
    toy: Callable[..., Toy], scheme: str, wanted: str | None, expected: str
) -> None:
    seen = toy(round=Stage("toy", Reordering, Toy.round))
    source = MemorySource(build("llama", dtype=torch.float16))
    recipe = Recipe(scheme=parse(scheme), algorithm=seen.name)
    if expected == "consecutive":
        with pytest.raises(BitwrightError, match="consecutive"):
            make_plan(source, recipe, format=wanted, group_fallback="error")
    else:
        assert make_plan(source, recipe, format=wanted, group_fallback="error").format.name == expected
