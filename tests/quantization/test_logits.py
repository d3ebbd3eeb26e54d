"""Tuning a whole model by its logits: the chain of blocks against plain backpropagation, resumption, streaming."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import bitwright
from bitwright.core.errors import BitwrightError
from bitwright.models.blocks import find_blocks, set_module
from bitwright.models.quantized import QuantizedLinear
from bitwright.quantization.logits import LogitsOptions, LogitsTask, LogitsUpdates, _Run, tune_logits
from tests.quantization.tiny import VOCABULARY, build_model

OPTIONS = LogitsOptions(steps=12, batch=4, lr=0.01, check_every=4, held_back=0.25, codes_up_to=0)
EVERY = 1_000_000


def make_task(family: str = "qwen2", scheme: str = "w2g16-asym", windows: int = 12) -> tuple[nn.Module, LogitsTask]:
    """A float model, and the task of its quantized copy."""
    model = build_model(family)
    quantized = bitwright.quantize_module(model, scheme=scheme)
    ids = torch.randint(0, VOCABULARY, (windows, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    return model, LogitsTask(
        model=quantized,
        blocks=find_blocks(model).name,
        windows=tuple(ids),
        reference=lambda index: logits[index],
        float_weight=lambda name: model.get_submodule(name).weight.detach(),
    )


def divergence(task: LogitsTask, model: nn.Module) -> float:
    with torch.no_grad():
        found = torch.log_softmax(model(input_ids=torch.stack(list(task.windows))).logits.double(), -1)
    wanted = torch.stack([torch.log_softmax(task.reference(n).double(), -1) for n in range(len(task.windows))])
    return float((wanted.exp() * (wanted - found)).sum(-1).mean())


def updated(task: LogitsTask, updates: LogitsUpdates) -> nn.Module:
    """A copy of the task's model with the updates in it."""
    model = copy.deepcopy(task.model)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, vector in updates.vectors.items():
            parameters[name].copy_(vector)
    for name, tensor in updates.tensors.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        bias = None if layer.bias is None else layer.bias.detach()
        set_module(model, name, QuantizedLinear.build(tensor, bias, layer.scheme, layer.input_scale))
    return model


def dense(model: nn.Module) -> tuple[nn.Module, dict[str, Tensor]]:
    """The quantized model with float weights as leaves, for plain backpropagation."""
    copied, leaves = copy.deepcopy(model), {}
    for name, layer in list(copied.named_modules()):
        if isinstance(layer, QuantizedLinear):
            plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            plain.weight = nn.Parameter(layer.dequantize())
            if layer.bias is not None:
                plain.bias = nn.Parameter(layer.bias.detach().clone())
            set_module(copied, name, plain)
            leaves[name] = plain.weight
    return copied.requires_grad_(True), leaves


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "opt", "gpt_neox", "gemma2"])
def test_gradients_through_the_chain_are_those_of_backpropagation(family: str) -> None:
    _, task = make_task(family)
    batch = [0, 3, 5]
    plain, leaves = dense(task.model)
    found = torch.log_softmax(plain(input_ids=torch.stack([task.windows[n] for n in batch])).logits, -1)
    wanted = torch.log_softmax(torch.stack([task.reference(n) for n in batch]), -1)
    loss = functional.kl_div(found, wanted, log_target=True, reduction="sum") / (3 * 16)
    loss.backward()
    run, gradients = _Run(task, OPTIONS, 0), {}
    run.adam.update = lambda values, named, rates: gradients.update(named)  # type: ignore[method-assign, misc]
    with torch.enable_grad():
        run.step(batch, {"": 0.1})
    run.close()
    norms = {name: value for name, value in plain.named_parameters() if value.dim() == 1}
    compared = 0
    for name, gradient in gradients.items():
        if name.endswith(".scale"):
            layer = name.removesuffix(".scale")
            tensor = task.model.get_submodule(layer).unpack()
            worth = leaves[layer].grad * tensor.dequantize()  # the gradient of a scale's multiplier is this, summed up
            expected = worth.view(worth.shape[0], -1, 16).sum(-1)
        else:
            unit = norms[name].detach().square().mean().sqrt()
            expected = norms[name].grad * unit
        torch.testing.assert_close(gradient, expected, rtol=2e-3, atol=2e-6)
        compared += 1
    assert compared > len(leaves)


@pytest.mark.parametrize(("scheme", "codes"), [("w2g16-asym", False), ("w3g16", False), ("w3g16", True)])
def test_predictions_come_nearer_to_the_float_models(scheme: str, codes: bool) -> None:
    _, task = make_task(scheme=scheme)
    options = LogitsOptions(
        steps=24, batch=4, lr=0.01, code_lr=0.03, codes_up_to=EVERY * codes, check_every=4, held_back=0.25
    )
    before = {name: value.clone() for name, value in task.model.state_dict().items()}
    updates = tune_logits(task, options)
    assert updates is not None
    assert updates.after < updates.before
    assert all(torch.equal(value, before[name]) for name, value in task.model.state_dict().items())
    assert divergence(task, updated(task, updates)) < 0.9 * divergence(task, task.model)
    same = [
        torch.equal(tensor.codes, task.model.get_submodule(name).unpack().codes)
        for name, tensor in updates.tensors.items()
    ]
    assert all(same) != codes


def test_the_divergence_told_is_that_of_the_model_made() -> None:
    _, task = make_task()
    updates = tune_logits(task, OPTIONS)
    assert updates is not None
    judged = _Run(task, OPTIONS, 0)
    judged.close()
    held = LogitsTask(
        model=task.model,
        blocks=task.blocks,
        windows=[task.windows[n] for n in judged.judged],
        reference=lambda n: task.reference(judged.judged[n]),
    )
    assert divergence(held, updated(task, updates)) == pytest.approx(updates.after, rel=1e-4)
    assert divergence(held, task.model) == pytest.approx(updates.before, rel=1e-4)


def same(left: LogitsUpdates | None, right: LogitsUpdates | None) -> bool:
    assert left is not None
    assert right is not None
    tensors = all(torch.equal(left.tensors[n].dequantize(), right.tensors[n].dequantize()) for n in left.tensors)
    return tensors and all(torch.equal(left.vectors[name], right.vectors[name]) for name in left.vectors)


@pytest.mark.parametrize("codes", [False, True])
def test_an_interrupted_run_ends_with_the_same_numbers(codes: bool) -> None:
    _, task = make_task()
    options = LogitsOptions(steps=12, batch=4, lr=0.01, codes_up_to=EVERY * codes, check_every=4, held_back=0.25)
    states: list[dict[str, Tensor]] = []
    straight = tune_logits(task, options, on_check=lambda state, _: states.append(dict(state)))
    assert [int(state["step"]) for state in states] == [4, 8, 12]
    for state in states[:2]:
        assert all(isinstance(value, Tensor) for value in state.values())
        assert same(straight, tune_logits(task, options, state=state))


@pytest.mark.parametrize("codes", [False, True])
def test_blocks_that_are_loaded_one_at_a_time_give_the_same(codes: bool) -> None:
    _, task = make_task()
    options = LogitsOptions(steps=6, batch=4, lr=0.01, codes_up_to=EVERY * codes, check_every=3, held_back=0.25)
    blocks = list(task.model.get_submodule(task.blocks))  # type: ignore[call-overload]
    skeleton = copy.deepcopy(task.model)
    for number in range(len(blocks)):
        set_module(skeleton, f"{task.blocks}.{number}", copy.deepcopy(blocks[number]).to("meta"))
    streamed = LogitsTask(
        model=skeleton,
        blocks=task.blocks,
        windows=task.windows,
        reference=task.reference,
        load_block=lambda number: copy.deepcopy(blocks[number]),
        float_weight=task.float_weight,
    )
    assert same(tune_logits(task, options), tune_logits(streamed, options))


def test_nothing_is_returned_where_nothing_was_gained() -> None:
    _, task = make_task(scheme="w8g16-asym")
    assert tune_logits(task, LogitsOptions(steps=3, lr=0.9, batch=4, check_every=1)) is None
    assert tune_logits(task, LogitsOptions(steps=0)) is None


@pytest.mark.parametrize(
    "field", ["steps", "batch", "lr", "codes_up_to", "code_lr", "warmup", "held_back", "check_every"]
)
def test_options_out_of_range_are_refused(field: str) -> None:
    values: dict[str, Any] = {field: -1}
    with pytest.raises(BitwrightError, match=f"{field} is -1"):
        LogitsOptions(**values)


def test_too_little_text_is_refused() -> None:
    _, task = make_task(windows=1)
    with pytest.raises(BitwrightError, match="two windows"):
        tune_logits(task, OPTIONS)


def test_the_best_composition_on_a_language_model() -> None:
    """Through the whole library: blocks by choice and learning, then the pass by logits over what they made."""
    model, task = make_task()
    ids = torch.stack(list(task.windows))
    short = {"steps": 16, "code_steps": 16, "scale_steps": 8}
    found = {}
    for name, options in (("rtn", {}), ("gptq+logits", {"steps": 16}), ("best", short)):
        prepared = bitwright.prepare(model, scheme="w2g16-asym", algorithm=name, options=options)
        for window in ids:
            prepared(input_ids=window.unsqueeze(0))
        found[name] = divergence(task, bitwright.convert(prepared))
    assert found["gptq+logits"] < 0.8 * found["rtn"]
    assert found["best"] < 0.8 * found["rtn"]
