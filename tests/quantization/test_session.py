"""Modules in memory: any way a block may be called, prepared with batches or converted at once."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse
from bitwright.models.blocks import find_blocks
from bitwright.models.quantized import QuantizedLinear
from bitwright.models.rotation import refuse_rotation
from bitwright.quantization.algorithms import ALGORITHMS
from bitwright.quantization.capture import capture, run_block
from bitwright.quantization.rtn import RTN, RtnOptions
from bitwright.quantization.session import convert, prepare, quantize_module
from bitwright.quantization.stages import Algorithm, BlockTask, Stage
from bitwright.quantization.statistics import SiteStatistics, collect_statistics
from tests.quantization.few_steps import few_steps
from tests.quantization.tiny import Plain, PlainBlock, build_model

WIDTH = 32


def state_hash(model: nn.Module) -> str:
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode() + tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def same_state(left: nn.Module, right: nn.Module) -> bool:
    a, b = left.state_dict(), right.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_plain_module_is_quantized_in_its_blocks() -> None:  # W36
    model = Plain(WIDTH)
    quantized = quantize_module(model, scheme="w4g32")
    changed = {name for name, module in quantized.named_modules() if isinstance(module, QuantizedLinear)}
    assert changed == {f"blocks.{block}.{layer}" for block in range(3) for layer in ("up", "down")}
    x = torch.randn(5, 8)
    dense = copy.deepcopy(model)
    for name in changed:
        layer = dense.get_submodule(name)
        tensor = QuantizedTensor.quantize(layer.weight.detach(), parse("w4g32").weight)
        layer.weight = nn.Parameter(tensor.dequantize())
    torch.testing.assert_close(quantized(x), dense(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_source_is_left_alone_unless_it_may_be_changed(family: str, algorithm: str) -> None:  # W43
    model = build_model(family)
    if ALGORITHMS[algorithm].rotate is not None and refuse_rotation(model) is not None:
        pytest.skip(f"{family} cannot be rotated, which tests of rotation say")
    before, modules = state_hash(model), dict(model.named_modules())
    ids, options = torch.arange(16)[None], few_steps(algorithm)
    prepared = prepare(model, scheme="w4g32", algorithm=algorithm, options=options, overrides=["lm_head=w8"])
    for _ in range(2):
        prepared(input_ids=ids)
    converted = convert(prepared)
    assert state_hash(model) == before and dict(model.named_modules()) == modules
    assert converted is not model
    if not ALGORITHMS[algorithm].calibrated:
        at_once = quantize_module(model, scheme="w4g32", algorithm=algorithm, overrides=["lm_head=w8"])
        assert state_hash(model) == before
        assert same_state(at_once, converted)
        with torch.no_grad():
            assert torch.equal(at_once(ids).logits, converted(ids).logits)
    inplace = prepare(
        model, scheme="w4g32", algorithm=algorithm, options=options, overrides=["lm_head=w8"], inplace=True
    )
    inplace(input_ids=ids)
    inplace(input_ids=ids)
    assert convert(inplace) is model and same_state(model, converted)


def test_preparing_changes_no_output() -> None:
    model = build_model("llama")
    prepared = prepare(model, scheme="w4g32")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(prepared(input_ids=ids).logits, model(input_ids=ids).logits)


class Tupled(PlainBlock):
    """Returns what older transformers' blocks do."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), "attention weights"


class Named(PlainBlock):
    """Takes its hidden states by name, and a mask beside them."""

    def forward(self, *, mask: Tensor, hidden_states: Tensor) -> Tensor:
        return super().forward(hidden_states) * mask


class InPlace(PlainBlock):
    """Adds to what it was given."""

    def forward(self, x: Tensor) -> Tensor:
        x += self.down(torch.relu(self.up(self.norm(x))))
        return x


class Numbered(PlainBlock):
    """Has an attribute that the model reads."""

    kind = "numbered"


class Any_(Plain):
    """A plain model whose blocks are of any of these kinds."""

    def __init__(self, kind: type[PlainBlock]) -> None:
        super().__init__(WIDTH, blocks=0)
        self.kind = kind
        self.blocks = nn.ModuleList(kind(WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for number, block in enumerate(self.blocks):
            if self.kind is Named:
                x = block(mask=torch.full((1,), 1.0 + number), hidden_states=x)
            elif self.kind is Tupled:
                x, note = block(x)
                assert note == "attention weights"
            else:
                assert self.kind is not Numbered or block.kind == "numbered"
                x = block(x)
        return self.head(x)


@pytest.fixture
def observed(monkeypatch: pytest.MonkeyPatch) -> list[BlockTask]:
    """The tasks that an algorithm called ``look`` is given."""
    tasks: list[BlockTask] = []

    def tune(task: BlockTask, tensors: Mapping[str, QuantizedTensor], options: RtnOptions) -> Any:
        tasks.append(task)
        return tensors

    row = Algorithm(round=RTN, tune=(Stage("look", RtnOptions, tune),), calibrated=True)
    monkeypatch.setitem(ALGORITHMS, "look", row)
    return tasks


@pytest.mark.parametrize("kind", [PlainBlock, Tupled, Named, InPlace, Numbered])
def test_blocks_may_be_called_in_many_ways(kind: type[PlainBlock], observed: list[BlockTask]) -> None:
    torch.manual_seed(0)
    model, batches = Any_(kind), [torch.randn(4, 8) for _ in range(3)]
    if kind is Tupled:
        # What a model does with the rest of a tuple cannot be known: only the hidden states are passed on.
        model.forward = lambda x: model.head(_through(model, x))  # type: ignore[method-assign]
    prepared = prepare(model, scheme="w4g32", algorithm="look")
    if kind is Tupled:
        inner = prepared.model
        inner.forward = lambda x: inner.head(_through(inner, x))  # type: ignore[method-assign]
    for batch in batches:
        prepared(batch)
    quantized = convert(prepared)
    assert [task.name for task in observed] == ["blocks.0", "blocks.1", "blocks.2"]
    for number, task in enumerate(observed):
        seen: list[Tensor] = []

        def look(_: nn.Module, inputs: tuple[Tensor, ...], seen: list[Tensor] = seen) -> None:
            seen.append(inputs[0].clone())

        hook = quantized.get_submodule(f"blocks.{number}.norm").register_forward_pre_hook(look)
        for batch in batches:
            quantized(batch)
        hook.remove()
        assert all(torch.equal(*pair) for pair in zip(seen, task.inputs, strict=True)), f"inputs of {task.name}"
        assert task.statistics[f"{task.name}.up"].tokens == 12


def _through(model: Any, x: Tensor) -> Tensor:
    x = model.embed(x)
    for block in model.blocks:
        x = block(x)[0]
    return x


@pytest.mark.parametrize("family", ["qwen2", "gpt2", "mistral", "gpt_neox", "opt", "falcon", "bloom", "gemma3_text"])
def test_batches_may_be_padded_and_keep_their_cache(family: str, observed: list[BlockTask]) -> None:
    """A model that fills a cache by itself must not attend to what an earlier pass left there."""
    model = build_model(family)
    prepared = prepare(model, scheme="w3g32", algorithm="look")
    batches = [
        {"input_ids": torch.arange(24).reshape(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.int64)},
        {"input_ids": torch.arange(6, 30).reshape(2, 12), "attention_mask": torch.ones(2, 12, dtype=torch.int64)},
        {"input_ids": torch.arange(15).reshape(3, 5), "attention_mask": torch.ones(3, 5, dtype=torch.int64)},
    ]
    batches[1]["attention_mask"][0, :7] = 0  # left padding
    batches[2]["attention_mask"][2, 3:] = 0  # right padding
    with torch.no_grad():
        for batch in batches:
            prepared(**batch)  # with use_cache as the configuration has it: on
    quantized = convert(prepared)
    for task in observed:
        seen: list[Tensor] = []

        def look(_: nn.Module, inputs: tuple[Tensor, ...], keywords: dict[str, Any], seen: list[Tensor] = seen) -> None:
            seen.append((inputs[0] if inputs else keywords["hidden_states"]).clone())

        hook = quantized.get_submodule(task.name).register_forward_pre_hook(look, with_kwargs=True)
        with torch.no_grad():
            for batch in batches:
                for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                    quantized(ids[mask.bool()][None], use_cache=False)
        hook.remove()
        assert [len(given) for given in task.inputs] == [1] * 7
        for found, given in zip(seen, task.inputs, strict=True):
            torch.testing.assert_close(found, given, atol=1e-6, rtol=1e-5)


def test_calibration_is_without_dropout_and_the_mode_is_given_back(observed: list[BlockTask]) -> None:
    model = build_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    results = []
    for training in (True, False):
        prepared = prepare(model.train(training), scheme="w4g32", algorithm="look")
        prepared(input_ids=torch.arange(12)[None])
        quantized = convert(prepared)
        assert quantized.training is training
        results.append([task.statistics for task in observed])
        observed.clear()
    for left, right in zip(*results, strict=True):
        assert all(torch.equal(left[name].sum_of_squares, right[name].sum_of_squares) for name in left)


def test_a_failed_conversion_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Plain(WIDTH)
    before, modules = state_hash(model), dict(model.named_modules())
    rounded = 0

    def fail_late(weight: Tensor, statistics: object, scheme: Any, options: Any) -> QuantizedTensor:
        nonlocal rounded
        rounded += 1
        if rounded == 5:
            raise BitwrightError("BW602", "the fifth is one too many")
        return QuantizedTensor.quantize(weight, scheme)

    monkeypatch.setitem(ALGORITHMS, "fails", Algorithm(round=Stage("fails", RtnOptions, fail_late)))
    with pytest.raises(BitwrightError) as caught:
        quantize_module(model, scheme="w4g32", algorithm="fails", inplace=True)
    assert caught.value.code == "BW602" and "blocks.2.up" in caught.value.what
    assert state_hash(model) == before and dict(model.named_modules()) == modules


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_activations_that_are_not_finite_name_sample_and_layer(value: float, observed: list[BlockTask]) -> None:
    model = Plain(WIDTH)
    before = state_hash(model)
    prepared = prepare(model, scheme="w4g32", algorithm="look", inplace=True)
    prepared(torch.randn(3, 8))
    prepared(torch.randn(3, 8).index_fill_(1, torch.tensor(2), value))
    with pytest.raises(BitwrightError) as caught:
        convert(prepared)
    assert caught.value.code == "BW601" and caught.value.exit_status == 6
    assert "sample 1" in caught.value.what and "blocks.0" in caught.value.what
    assert state_hash(model) == before


def test_an_overflow_inside_a_block_names_the_linear_that_reads_it(observed: list[BlockTask]) -> None:
    model = Plain(WIDTH)
    with torch.no_grad():
        model.blocks[1].up.bias.fill_(3e38)
        model.blocks[1].up.weight.mul_(1e36)
    prepared = prepare(model, scheme="w8", algorithm="look")
    prepared(torch.randn(3, 8) * 1e3)
    with pytest.raises(BitwrightError) as caught:
        convert(prepared)
    assert caught.value.code == "BW601" and "sample 0" in caught.value.what and "blocks.1" in caught.value.what


def test_a_calibrated_algorithm_needs_batches(observed: list[BlockTask]) -> None:
    model = Plain(WIDTH)
    for attempt in (
        lambda: convert(prepare(model, scheme="w4g32", algorithm="look")),
        lambda: quantize_module(model, algorithm="look", scheme="w4g32"),
    ):
        with pytest.raises(BitwrightError) as caught:
            attempt()
        assert caught.value.code == "BW401" and "look" in caught.value.what


def test_a_block_that_is_shared_is_refused_or_right() -> None:
    """One block object in several places of the list: never half quantized, never a crash."""
    model = Plain(WIDTH, blocks=1)
    model.blocks = nn.ModuleList([model.blocks[0]] * 3)
    x = torch.randn(5, 8)
    try:
        quantized = quantize_module(model, scheme="w8")
    except BitwrightError as error:
        assert error.code == "BW313" and "blocks" in error.what
        return
    assert all(isinstance(block.up, QuantizedLinear) for block in quantized.blocks)
    torch.testing.assert_close(quantized(x), model(x), atol=0.05, rtol=0.05)


def test_a_linear_that_is_never_run_is_rounded_without_statistics(observed: list[BlockTask]) -> None:
    model = Plain(WIDTH, blocks=2)
    model.blocks[0].spare = nn.Linear(WIDTH, WIDTH)
    prepared = prepare(model, scheme="w4g32", algorithm="look")
    prepared(torch.randn(3, 8))
    assert isinstance(convert(prepared).blocks[0].spare, QuantizedLinear)
    assert "blocks.0.spare" not in observed[0].statistics


def test_capturing_restores_the_model_whatever_happens() -> None:
    model = Plain(WIDTH)
    modules = dict(model.named_modules())

    def fail() -> None:
        raise RuntimeError("in the middle of a forward")

    with pytest.raises(RuntimeError):
        capture(model, find_blocks(model), [lambda: model(torch.randn(2, 8)), fail])
    assert dict(model.named_modules()) == modules


def test_captured_calls_reproduce_the_model_and_are_shared() -> None:
    model = build_model("gemma2")
    blocks = find_blocks(model)
    ids = torch.arange(3 * 20).reshape(3, 20) % 32
    forwards = [lambda row=row: model(input_ids=row[None], use_cache=False) for row in ids]
    captured = capture(model, blocks, forwards)
    # Two kinds of layers, sliding and full, have two masks; all samples of one length share them.
    assert len({id(call) for calls in captured.calls for call in calls}) == 2
    with torch.no_grad():
        for sample, row in enumerate(ids):
            hidden = captured.inputs[sample]
            for number, block in enumerate(blocks.modules):
                hidden = run_block(block, hidden, captured.calls[number][sample])
            expected = model.model(input_ids=row[None], use_cache=False).last_hidden_state
            assert torch.equal(model.model.norm(hidden), expected)


def test_statistics_of_parts_add_up() -> None:
    torch.manual_seed(1)
    linear, batches = nn.Linear(6, 3), [torch.randn(count, 2, 6) * 3 for count in (1, 4, 2)]
    forwards = [lambda batch=batch: linear(batch) for batch in batches]
    found = collect_statistics({"a": linear}, forwards, with_gram=True).statistics["a"]
    whole = SiteStatistics(6, with_gram=True)
    whole.add(torch.cat([batch.reshape(-1, 6) for batch in batches]))
    assert found.tokens == whole.tokens == 14
    torch.testing.assert_close(found.sum_of_squares, whole.sum_of_squares)
    torch.testing.assert_close(found.sum_of_magnitudes, whole.sum_of_magnitudes)
    assert torch.equal(found.largest, whole.largest)
    assert found.gram is not None and whole.gram is not None
    torch.testing.assert_close(found.gram, whole.gram)
    torch.testing.assert_close(found.gram.diagonal().double(), found.sum_of_squares, rtol=1e-5, atol=1e-5)


def test_statistics_of_bfloat16_do_not_stall() -> None:
    """A running sum in bfloat16 stops growing at 256; ours does not."""
    linear = nn.Linear(4, 1).to(torch.bfloat16)
    ones = torch.ones(3000, 4, dtype=torch.bfloat16)
    found = collect_statistics({"a": linear}, [lambda: linear(ones)], with_gram=True).statistics["a"]
    assert found.sum_of_squares.tolist() == [3000.0] * 4 and found.gram is not None
    assert torch.equal(found.gram, torch.full((4, 4), 3000.0))


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"scheme": "w9"}, "BW202"),
        ({"algorithm": "magic"}, "BW201"),
        ({"options": {"speed": 3}}, "BW201"),
        ({"options": {"search": "yes"}}, "BW201"),
        ({"options": {"range": "wide"}}, "BW201"),
        ({"scheme": "w4g24"}, "BW204"),
        ({"overrides": ["nowhere=w8"]}, "BW208"),
        ({"overrides": ["(=w8"]}, "BW201"),
        ({"group_fallback": "hope"}, "BW201"),
    ],
)
def test_impossible_wishes_fail_when_they_are_made(arguments: dict[str, Any], code: str) -> None:
    model = Plain(WIDTH)
    before = state_hash(model)
    for function in (prepare, quantize_module):
        with pytest.raises(BitwrightError) as caught:
            function(model, **({"scheme": "w4g32", "inplace": True} | arguments))
        assert caught.value.code == code, caught.value.render()
    assert state_hash(model) == before
