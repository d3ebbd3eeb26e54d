"""The stages of the block stream, against a naive restatement with whole-model forwards."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme, QuantScheme
from bitwright.core.scheme_names import parse
from bitwright.formats.checkpoint import WORK_DIRECTORY
from bitwright.models.blocks import find_blocks, linear_weight, linears, set_module
from bitwright.models.hf import load_tokenizer
from bitwright.models.loading import load
from bitwright.models.quantized import QuantizedLinear
from bitwright.quantization.algorithms import ALGORITHMS
from bitwright.quantization.api import quantize
from bitwright.quantization.calibration import cut_windows, tokenize
from bitwright.quantization.events import Stopped
from bitwright.quantization.session import convert, prepare
from bitwright.quantization.stages import Algorithm, BlockTask, Stage
from bitwright.quantization.statistics import SiteStatistics
from bitwright.quantization.stream import block_seed
from tests.quantization.tiny import TEXT, digests, file_tensors, save_model

SCHEME = "w3g32"
SAMPLES, SEQLEN, SEED = 5, 12, 3


@dataclass(frozen=True)
class NoOptions:
    """For algorithms that have none."""


@dataclass
class Seen:
    """What the stages of an algorithm were given, in order."""

    rounded: list[tuple[Tensor, SiteStatistics | None]] = field(default_factory=list)
    equalized: list[BlockTask] = field(default_factory=list)
    tuned: list[tuple[BlockTask, Mapping[str, QuantizedTensor]]] = field(default_factory=list)
    order: list[str] = field(default_factory=list)

    def round(
        self, weight: Tensor, statistics: SiteStatistics | None, scheme: QuantScheme, options: NoOptions
    ) -> QuantizedTensor:
        self.order.append("round")
        self.rounded.append((weight.detach().clone(), statistics))
        return QuantizedTensor.quantize(weight, scheme)

    def equalize(self, task: BlockTask, options: NoOptions) -> Mapping[str, Tensor]:
        self.order.append("equalize")
        self.equalized.append(task)
        return {}

    def tune(
        self, task: BlockTask, tensors: Mapping[str, QuantizedTensor], options: NoOptions
    ) -> Mapping[str, QuantizedTensor]:
        self.order.append("tune")
        self.tuned.append((task, dict(tensors)))
        return tensors


@pytest.fixture
def register(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def add(name: str, *, round: Any, equalize: Any = None, tune: Any = None, **needs: bool) -> None:
        row = Algorithm(
            round=Stage("round", NoOptions, round),
            equalize=() if equalize is None else (Stage("equalize", NoOptions, equalize),),
            tune=() if tune is None else (Stage("tune", NoOptions, tune),),
            calibrated=True,
            **needs,
        )
        monkeypatch.setitem(ALGORITHMS, name, row)

    return add


@pytest.fixture(params=["qwen2", "gemma2", "gpt2"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_model(tmp_path / "model", request.param, num_hidden_layers=3, dtype=torch.bfloat16)
    (tmp_path / "text").write_text(TEXT)
    return tmp_path


def run(place: Path, output: str = "out", **changes: Any) -> Path:
    arguments = {"calibration": place / "text", "samples": SAMPLES, "seqlen": SEQLEN, "seed": SEED, "scheme": SCHEME}
    quantize(place / "model", place / output, format="native", **(arguments | changes))
    return place / output


def windows(place: Path) -> Tensor:
    ids = tokenize(load_tokenizer(place / "model"), TEXT)
    return cut_windows(ids, samples=SAMPLES, seqlen=SEQLEN, seed=SEED, source="text").windows


@torch.no_grad()
def inputs_in_whole_forwards(model: PreTrainedModel, module: nn.Module, ids: Tensor) -> list[Tensor]:
    """What ``module`` reads when the whole model runs each window."""
    seen: list[Tensor] = []

    def look(_: nn.Module, arguments: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        seen.append((arguments[0] if arguments else keywords["hidden_states"]).detach().clone())

    hook = module.register_forward_pre_hook(look, with_kwargs=True)
    for window in ids:
        model(input_ids=window[None], use_cache=False)
    hook.remove()
    return seen


def test_statistics_are_those_of_a_naive_run_on_quantized_predecessors(
    place: Path, register: Callable[..., None]
) -> None:
    seen = Seen()
    register("toy", round=seen.round, with_gram=True)
    run(place, algorithm="toy")
    model, ids = load(place / "model"), windows(place)
    blocks = find_blocks(model)
    given = iter(seen.rounded)
    for name, block in zip(blocks.names(), blocks.modules, strict=True):
        layers = linears(block, name)
        naive = {layer: inputs_in_whole_forwards(model, module, ids) for layer, module in layers.items()}
        for layer, module in layers.items():
            weight, statistics = next(given)
            assert torch.equal(weight, linear_weight(module)) and statistics is not None
            tokens = torch.cat([part.reshape(-1, part.shape[-1]) for part in naive[layer]]).double()
            assert statistics.tokens == len(tokens) == SAMPLES * SEQLEN and statistics.width == tokens.shape[1]
            torch.testing.assert_close(statistics.sum_of_squares, tokens.square().sum(0), rtol=1e-6, atol=1e-9)
            torch.testing.assert_close(statistics.sum_of_magnitudes, tokens.abs().sum(0), rtol=1e-6, atol=1e-9)
            assert torch.equal(statistics.largest.double(), tokens.abs().amax(0))
            assert statistics.gram is not None and statistics.gram.dtype == torch.float32
            torch.testing.assert_close(statistics.gram.double(), tokens.T @ tokens, rtol=1e-4, atol=1e-4)
        # From here on the block is quantized, as the blocks after it will meet it.
        for layer, module in layers.items():
            tensor = QuantizedTensor.quantize(linear_weight(module).detach(), parse(SCHEME).weight)
            set_module(model, layer, QuantizedLinear.build(tensor, module.bias, parse(SCHEME)))
    assert next(given, None) is None


SITES = {
    "qwen2": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
    "gemma2": [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}, {"down_proj"}],
    "gpt2": [{"attn.c_attn"}, {"attn.c_proj"}, {"c_fc"}, {"mlp.c_proj"}],
}


def test_linears_that_read_one_activation_share_its_statistics(
    place: Path, register: Callable[..., None], request: pytest.FixtureRequest
) -> None:
    seen = Seen()
    register("toy", round=seen.round, equalize=seen.equalize)
    run(place, algorithm="toy")
    for task in seen.equalized:
        sites: dict[int, set[str]] = {}
        for layer, statistics in task.statistics.items():
            sites.setdefault(id(statistics), set()).add(layer)
        expected = SITES[request.node.callspec.params["place"]]
        ends = [end for group in expected for end in group]
        found = [{next(end for end in ends if layer.endswith(end)) for layer in site} for site in sites.values()]
        assert sorted(map(sorted, found)) == sorted(map(sorted, expected))


def test_each_block_is_given_what_the_quantized_blocks_before_it_make(
    place: Path, register: Callable[..., None]
) -> None:
    """Bit for bit, as the finished checkpoint computes it too."""
    seen = Seen()
    register("toy", round=seen.round, tune=seen.tune)
    with pytest.raises(Stopped):
        run(place, algorithm="toy", overrides=["lm_head=w8"], should_stop=lambda: len(seen.tuned) == 3)
    (saved,) = (place / "out" / WORK_DIRECTORY).glob("inputs-*")
    final = load_file(saved)
    run(place, algorithm="toy", overrides=["lm_head=w8"])
    model, ids = load(place / "out"), windows(place)
    for task, _ in seen.tuned:
        naive = inputs_in_whole_forwards(model, model.get_submodule(task.name), ids)
        assert len(task.inputs) == len(naive) == SAMPLES
        assert all(torch.equal(given, found) for given, found in zip(task.inputs, naive, strict=True))
    norm = next(module for name, module in model.named_modules() if name.endswith(("model.norm", "transformer.ln_f")))
    ends = inputs_in_whole_forwards(model, norm, ids)
    assert all(torch.equal(final[f"{number:06d}"], end) for number, end in enumerate(ends))


def test_stages_come_in_order_once_a_block_with_its_own_seed(place: Path, register: Callable[..., None]) -> None:
    seen = Seen()
    register("toy", round=seen.round, equalize=seen.equalize, tune=seen.tune)
    run(place, algorithm="toy")
    names = find_blocks(load(place / "model")).names()
    count = len(seen.rounded) // 3
    assert seen.order == ["equalize", *["round"] * count, "tune"] * 3
    assert [task.name for task in seen.equalized] == list(names) == [task.name for task, _ in seen.tuned]
    seeds = [task.seed for task in seen.equalized]
    assert len(set(seeds)) == 3 and seeds == [block_seed(SEED, name) for name in names]
    assert seeds != [block_seed(SEED + 1, name) for name in names]
    for task, tensors in seen.tuned:
        assert tensors.keys() == task.linears.keys() == task.statistics.keys()
        assert all(name.startswith(task.name + ".") for name in tensors)


def test_after_equalizing_statistics_are_measured_again(tmp_path: Path, register: Callable[..., None]) -> None:
    save_model(tmp_path / "model", "llama", num_hidden_layers=2, num_key_value_heads=4, attention_bias=True)
    (tmp_path / "text").write_text(TEXT)
    plain, scaled = Seen(), Seen()
    register("plain", round=plain.round, equalize=plain.equalize)
    register("scaled", round=scaled.round, equalize=scale_mlp)
    run(tmp_path, "a", algorithm="plain", scheme="w8")
    run(tmp_path, "b", algorithm="scaled", scheme="w8")
    names = [f"model.layers.{block}.{layer}" for block in range(2) for layer in LLAMA_LAYERS]
    before, after = dict(zip(names, plain.rounded, strict=True)), dict(zip(names, scaled.rounded, strict=True))
    down = "model.layers.0.mlp.down_proj"
    assert before[down][1] is not None and after[down][1] is not None
    torch.testing.assert_close(after[down][1].largest, before[down][1].largest * 4)
    assert torch.equal(after[down][0], before[down][0] / 4)
    assert torch.equal(after["model.layers.0.mlp.up_proj"][0], before["model.layers.0.mlp.up_proj"][0] * 2)
    # The equalized floats reach the file, and the model still computes what it did.
    stored, original = file_tensors(tmp_path / "b"), file_tensors(tmp_path / "model")
    norm = "model.layers.1.post_attention_layernorm.weight"
    assert torch.equal(stored[norm], original[norm] * 2)
    assert torch.equal(stored["model.norm.weight"], original["model.norm.weight"])
    ids = windows(tmp_path)
    with torch.no_grad():
        before_logits, after_logits = (load(tmp_path / output)(ids).logits for output in "ab")
    torch.testing.assert_close(after_logits, before_logits, atol=2e-3, rtol=2e-2)


LLAMA_LAYERS = [
    *(f"self_attn.{layer}_proj" for layer in "qkvo"), "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
]  # fmt: skip


def scale_mlp(task: BlockTask, options: NoOptions) -> Mapping[str, Tensor]:
    """Scale the norm before the gate and up projections by two, and up to down by four: exact powers of two."""
    mlp: Any = task.block.get_submodule("mlp")
    before = [task.run(sample) for sample in range(len(task.inputs))]
    task.block.get_parameter("post_attention_layernorm.weight").mul_(2)
    mlp.gate_proj.weight.div_(2)
    mlp.up_proj.weight.mul_(2)
    mlp.down_proj.weight.div_(4)
    after = [task.run(sample) for sample in range(len(task.inputs))]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    return {}


def test_what_a_tuner_returns_is_stored_reported_and_met_by_the_next_block(
    place: Path, register: Callable[..., None]
) -> None:
    seen = Seen()

    def zero_out(
        task: BlockTask, tensors: Mapping[str, QuantizedTensor], options: NoOptions
    ) -> Mapping[str, QuantizedTensor]:
        assert not any(isinstance(module, QuantizedLinear) for module in task.block.modules())
        seen.tuned.append((task, tensors))
        return {name: dataclasses.replace(t, codes=torch.zeros_like(t.codes)) for name, t in tensors.items()}

    register("toy", round=seen.round, tune=zero_out)
    output = run(place, algorithm="toy")
    codes = [tensor for name, tensor in file_tensors(output).items() if name.endswith(".codes")]
    words = {int(word) for tensor in codes for word in tensor.unique()}
    assert len(words) <= 3  # a row of 3-bit codes that are all zero, counted from -4
    model = load(output)
    last = seen.tuned[2][0]
    found = inputs_in_whole_forwards(model, model.get_submodule(last.name), windows(place))
    assert all(torch.equal(*pair) for pair in zip(found, last.inputs, strict=True))


def test_an_interrupted_calibrated_algorithm_is_resumed_to_the_same_bytes(
    place: Path, register: Callable[..., None]
) -> None:
    """With a tuner that draws from its seed and looks at its inputs."""

    def jitter(
        task: BlockTask, tensors: Mapping[str, QuantizedTensor], options: NoOptions
    ) -> Mapping[str, QuantizedTensor]:
        generator = torch.Generator().manual_seed(task.seed)
        changed = {}
        for name, tensor in tensors.items():
            flip = torch.rand(tensor.codes.shape, generator=generator) < 0.1 + 0.001 * float(task.inputs[0][0, 0, 0])
            changed[name] = dataclasses.replace(tensor, codes=torch.where(flip, 0, tensor.codes))
        return changed

    seen = Seen()
    register("toy", round=seen.round, equalize=seen.equalize, tune=jitter)
    whole = run(place, "whole", algorithm="toy", overrides=["lm_head=w4g32"])
    while True:
        try:
            resumed = run(place, algorithm="toy", overrides=["lm_head=w4g32"], should_stop=lambda: True)
            break
        except Stopped:
            continue
    assert digests(resumed) == digests(whole)
    other = run(place, "other", algorithm="toy", overrides=["lm_head=w4g32"], seed=SEED + 1)
    assert digests(other)["model-00002-of-00005.safetensors"] != digests(whole)["model-00002-of-00005.safetensors"]


def test_the_same_stages_serve_a_prepared_module(tmp_path: Path, register: Callable[..., None]) -> None:
    save_model(tmp_path / "model", "llama")
    (tmp_path / "text").write_text(TEXT)
    disk, memory = Seen(), Seen()
    register("disk", round=disk.round, equalize=disk.equalize, tune=disk.tune)
    register("memory", round=memory.round, equalize=memory.equalize, tune=memory.tune)
    run(tmp_path, algorithm="disk")
    prepared = prepare(load(tmp_path / "model"), scheme=SCHEME, algorithm="memory", seed=SEED)
    for window in windows(tmp_path):
        prepared(input_ids=window[None], use_cache=False)
    model = convert(prepared)
    assert disk.order == memory.order
    for (task, tensors), (other_task, other_tensors) in zip(disk.tuned, memory.tuned, strict=True):
        assert task.name == other_task.name and task.seed == other_task.seed
        assert all(torch.equal(*pair) for pair in zip(task.inputs, other_task.inputs, strict=True))
        assert all(torch.equal(tensors[name].codes, other_tensors[name].codes) for name in tensors)
        for name, statistics in task.statistics.items():
            assert torch.equal(statistics.sum_of_squares, other_task.statistics[name].sum_of_squares)
    ids = windows(tmp_path)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load(tmp_path / "out")(ids).logits)


def test_layer_schemes_reach_the_stages(tmp_path: Path, register: Callable[..., None]) -> None:
    save_model(tmp_path / "model", "llama")
    (tmp_path / "text").write_text(TEXT)
    seen = Seen()
    register("toy", round=seen.round, equalize=seen.equalize)
    run(tmp_path, algorithm="toy", overrides=[".*q_proj=float", ".*down_proj=w8"])
    linears_seen: dict[str, LayerScheme] = {**seen.equalized[0].linears, **seen.equalized[1].linears}
    assert not any("q_proj" in name for name in linears_seen) and len(linears_seen) == 12
    assert {name for name, scheme in linears_seen.items() if scheme.weight.bits == 8} == {
        f"model.layers.{block}.mlp.down_proj" for block in range(2)
    }
