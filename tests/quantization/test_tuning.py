"""What the gradient-based passes share: Adam restated, schedules, batches, and that a block comes back as it was."""

from __future__ import annotations

import math
from itertools import islice

import pytest
import torch
from torch import nn

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse
from bitwright.quantization.fake_quant import CodeWeight
from bitwright.quantization.tuning import Adam, TunedBlock, draw_batches, learning_rate, stand_ins
from tests.quantization.tiny import PlainBlock


def test_adam_is_that_of_the_paper() -> None:
    """Kingma and Ba 2014, algorithm 1, in float64."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randn(3, generator=generator) for _ in range(5)]
    values, adam = {"layer.scale": torch.ones(3)}, Adam()
    expected, first, second = torch.ones(3).double(), torch.zeros(3).double(), torch.zeros(3).double()
    for count, gradient in enumerate(gradients, 1):
        adam.begin()
        adam.update(values, {"layer.scale": gradient}, {"": 0.1})
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.99 * second + 0.01 * gradient.double() ** 2
        expected -= 0.1 * (first / (1 - 0.9**count)) / ((second / (1 - 0.99**count)).sqrt() + 1e-12)
        torch.testing.assert_close(values["layer.scale"].double(), expected, rtol=1e-5, atol=1e-6)


def test_adam_goes_on_from_its_state() -> None:
    gradients = [torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.1]), torch.tensor([-1.0, 3.0])]
    straight, broken = {"x.scale": torch.zeros(2)}, {"x.scale": torch.zeros(2)}
    adam = Adam()
    for gradient in gradients:
        adam.begin()
        adam.update(straight, {"x.scale": gradient}, {"": 0.1})
    adam = Adam()
    for gradient in gradients:
        again = Adam()
        again.load(adam.state())
        adam = again
        adam.begin()
        adam.update(broken, {"x.scale": gradient}, {"": 0.1})
    assert torch.equal(straight["x.scale"], broken["x.scale"])


def test_step_sizes_go_by_the_last_part_of_a_name() -> None:
    values = {"a.scale": torch.zeros(1), "a.position": torch.zeros(1), "norm.weight": torch.zeros(1)}
    adam = Adam()
    adam.begin()
    adam.update(values, {name: torch.ones(1) for name in values}, {"": 0.1, "position": 0.5})
    assert {name: round(value.item(), 4) for name, value in values.items()} == {
        "a.scale": -0.1,
        "a.position": -0.5,
        "norm.weight": -0.1,
    }


def test_the_step_size_rises_and_falls() -> None:
    rates = [learning_rate(step, 40) for step in range(40)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert 0 < rates[-1] < 0.01
    assert math.isclose(learning_rate(0, 1), 1.0)
    waiting = [learning_rate(step, 50, wait=0.2) for step in range(50)]
    assert waiting == [0.0] * 10 + rates


def test_every_sample_comes_once_a_pass() -> None:
    batches = list(islice(draw_batches(range(10), 4, torch.Generator().manual_seed(0)), 5))
    assert [len(batch) for batch in batches] == [4] * 5
    drawn = [sample for batch in batches for sample in batch]
    assert sorted(drawn[:10]) == sorted(drawn[10:]) == list(range(10))
    assert drawn[:10] != drawn[10:]
    assert next(draw_batches(range(3), 8, torch.Generator().manual_seed(0))).__len__() == 3


def test_stand_ins_leave_when_something_fails() -> None:
    block = PlainBlock(8)
    before = dict(block.named_modules())
    with pytest.raises(ZeroDivisionError), stand_ins(block, {"some.name": block.up}) as layers:
        assert block.up is layers["some.name"]
        assert not any(parameter.requires_grad for parameter in block.parameters())
        raise ZeroDivisionError
    assert dict(block.named_modules()) == before
    assert all(parameter.requires_grad for parameter in block.parameters())


def make_tuned(dtype: torch.dtype = torch.float32) -> tuple[PlainBlock, TunedBlock]:
    torch.manual_seed(0)
    block = PlainBlock(8).to(dtype)
    layers: dict[str, nn.Module] = {"blocks.0.up": block.up, "blocks.0.down": block.down}
    weights = {
        name: CodeWeight(QuantizedTensor.quantize(layer.weight.detach(), parse("w4g8-asym").weight))
        for name, layer in layers.items()
    }
    return block, TunedBlock(block, layers, weights, dtype)


def test_gradients_of_a_block_are_those_of_finite_differences() -> None:
    block, tuned = make_tuned(torch.float64)
    x = torch.randn(3, 8, dtype=torch.float64)
    block(x).square().sum().backward()
    gradients = tuned.gradients()
    assert set(gradients) == set(tuned.values) == {
        "blocks.0.up.scale", "blocks.0.down.scale", "up.bias", "norm.weight",
    }  # fmt: skip
    for name in ("norm.weight", "up.bias"):  # scales are rounded to float16, and have no finite differences
        ends = []
        for step in (1e-3, -1e-3):
            tuned.values[name][1] += step
            tuned.refresh()
            ends.append(block(x).square().sum().item())
            tuned.values[name][1] -= step
        assert gradients[name][1].item() == pytest.approx((ends[0] - ends[1]) / 2e-3, rel=1e-3)


def test_a_block_is_released_as_it_was_unless_told_otherwise() -> None:
    block, tuned = make_tuned()
    before = {name: value.clone() for name, value in block.state_dict().items() if "norm" in name or "bias" in name}
    layer = tuned.layers["blocks.0.up"]
    best = tuned.snapshot()
    for value in tuned.values.values():
        value += 0.1
    tuned.refresh()
    assert not torch.equal(block.norm.weight, before["norm.weight"])
    tuned.restore(best)
    assert torch.equal(block.norm.weight, before["norm.weight"])
    for value in tuned.values.values():
        value += 0.1
    tuned.refresh()
    changed = tuned.changed_vectors()
    tuned.release(keep_vectors=False)
    assert block.up is layer
    assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items() if name in before)
    torch.testing.assert_close(changed["norm.weight"], before["norm.weight"] * 1.1)


def test_vectors_of_zeros_stay() -> None:
    """They have no size in which to measure steps; the bias of a fresh LayerNorm is one."""
    block, tuned = make_tuned()
    assert "norm.bias" not in tuned.values
    assert torch.equal(block.norm.bias, torch.zeros(8))
    tuned.release(keep_vectors=False)
