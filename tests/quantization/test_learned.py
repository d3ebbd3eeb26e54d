"""The learned pass after rounding: it starts where the rounder ended, and never ends worse."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.quantization.learned import LearnedOptions, learn_from_codes
from bitwright.quantization.stages import BlockTask
from bitwright.quantization.tuning import Adam
from tests.quantization.test_autoround import error_of, make_task, round_to_nearest

ALL = {"code_lr": 0.02, "code_steps": 40, "scale_steps": 30, "batch": 4, "check_every": 5}


def shifted(task: BlockTask) -> dict[str, QuantizedTensor]:
    """Codes of another weight: those of a rounder that knows better than to take the nearest."""
    torch.manual_seed(5)
    found = {}
    for name, layer in task.layers.items():
        moved = layer.weight.detach() + 0.05 * torch.randn(layer.weight.shape)
        found[name] = QuantizedTensor.quantize(moved, task.linears[name].weight)
    return found


@pytest.mark.parametrize("scheme", ["w2g16-asym", "w3g16", "w3g16-asym-fz", "nf4g16", "w4g16-dq(w8g256-asym)"])
def test_it_improves_on_its_start(scheme: str) -> None:
    task = make_task(scheme)
    start = shifted(task)
    before = error_of(task, start)
    found = dict(learn_from_codes(task, start, LearnedOptions(**ALL, lr=0.01)))
    wanted = outputs_of(make_task(scheme))
    with torch.no_grad():
        for name, layer in task.layers.items():
            layer.weight = nn.Parameter(found[name].dequantize())
        after = [float((task.run(n) - want).square().mean()) for n, want in enumerate(wanted)]
    assert sum(after) / len(after) < 0.97 * before
    assert {name: tensor.scheme for name, tensor in found.items()} == {n: start[n].scheme for n in start}


def outputs_of(task: BlockTask) -> list[Tensor]:
    with torch.no_grad():
        return [task.run_on(hidden, 0) for hidden in task.reference_inputs]


def test_without_steps_nothing_changes() -> None:
    task = make_task()
    start = shifted(task)
    found = learn_from_codes(task, start, LearnedOptions(code_steps=0, scale_steps=0))
    assert found == start


@pytest.mark.parametrize("options", [{"code_steps": 5, "scale_steps": 0}, {"code_steps": 0, "scale_steps": 5}])
def test_it_is_never_worse_than_its_start(options: dict[str, int]) -> None:
    task = make_task("w8g16-asym")
    start, before = round_to_nearest(task), dict(task.block.state_dict())
    before = {name: value.clone() for name, value in before.items()}
    found = dict(learn_from_codes(task, start, LearnedOptions(**options, batch=2, lr=0.9, code_lr=0.9)))
    assert all(torch.equal(found[name].dequantize(), start[name].dequantize()) for name in start)
    assert all(torch.equal(value, before[name]) for name, value in task.block.state_dict().items())


def test_codes_stay_when_only_scales_learn() -> None:
    task = make_task()
    start = shifted(task)
    found = learn_from_codes(task, start, LearnedOptions(code_steps=0, scale_steps=20, lr=0.01))
    for name, tensor in found.items():
        assert torch.equal(tensor.codes, start[name].codes)
        assert not torch.equal(tensor.dense_scale(), start[name].dense_scale())
        assert tensor.zero is not None
        assert torch.equal(tensor.zero, start[name].zero)


def test_norms_move_only_if_they_may() -> None:
    for norms in (True, False):
        task = make_task()
        before = task.block.norm.weight.detach().clone()
        learn_from_codes(task, shifted(task), LearnedOptions(code_steps=0, scale_steps=20, lr=0.01, norms=norms))
        assert torch.equal(before, task.block.norm.weight) != norms
        assert task.block.up.weight.requires_grad
        assert task.block.norm.weight.requires_grad


def test_norms_wait_until_codes_have_settled() -> None:
    task = make_task()
    before, start = task.block.norm.weight.detach().clone(), shifted(task)
    found = learn_from_codes(task, start, LearnedOptions(code_steps=20, scale_steps=0, lr=0.01))
    assert any(not torch.equal(found[name].codes, start[name].codes) for name in start)
    assert torch.equal(before, task.block.norm.weight)


def test_codes_wait_as_long_as_they_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    update = Adam.update

    def note(adam: Adam, values: Any, gradients: Any, rates_: Mapping[str, float]) -> None:
        rates.append(rates_["position"])
        update(adam, values, gradients, rates_)

    monkeypatch.setattr(Adam, "update", note)
    task = make_task()
    learn_from_codes(task, shifted(task), LearnedOptions(code_steps=10, scale_steps=0, code_wait=0.3))
    assert rates[:3] == [0.0] * 3 and min(rates[3:9]) > 0


def test_the_seed_settles_everything() -> None:
    found = []
    for _ in range(2):
        task = make_task()
        found.append(learn_from_codes(task, shifted(task), LearnedOptions(**ALL)))
    assert all(torch.equal(found[0][name].dequantize(), found[1][name].dequantize()) for name in found[0])


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(BitwrightError, match="learned option batch is 0"):
        LearnedOptions(batch=0)
    with pytest.raises(BitwrightError, match="learned option code_lr is 2"):
        LearnedOptions(code_lr=2)
    task = make_task()
    bare = BlockTask(**{name: getattr(task, name) for name in task.__slots__} | {"inputs": ()})
    with pytest.raises(BitwrightError, match="calibration samples for blocks"):
        learn_from_codes(bare, shifted(bare), LearnedOptions())
