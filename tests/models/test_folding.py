"""Folding: a scale moves from a layer's input into what makes it, and the float model stays what it was."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from bitwright.models.blocks import find_blocks, linear_weight, linears
from bitwright.models.folding import Fold, apply_fold, holds, norm_offset, share_scale
from bitwright.models.sites import find_sites
from bitwright.quantization.capture import capture, run_block
from tests.models.architectures import ARCHITECTURES, build, sample_ids

ROUNDING = {torch.float16: 0.06, torch.bfloat16: 0.4}  # of logits of about 4, in the root mean square


def fold_everything(model: nn.Module, generator: torch.Generator) -> int:
    """Fold random scales from 1/4 to 4 wherever the model's blocks allow it; how many sites that were."""
    blocks = find_blocks(model)
    captured = capture(model, blocks, [partial(model, sample_ids(), use_cache=False)])
    count, hidden = 0, captured.inputs[0]
    for name, block, calls in zip(blocks.names(), blocks.modules, captured.calls, strict=True):
        run = partial(run_block, block, hidden, calls[0])
        hidden = run()
        modules = {f"{name}.{path}": module for path, module in block.named_modules()}
        for site in find_sites(block, name, linears(block, name), run):
            if site.fold is None:
                continue
            scale = 4 ** (torch.rand(site.width, generator=generator) * 2 - 1)
            scale = share_scale(site.fold, scale)
            apply_fold(site.fold, modules[site.fold.producer], [modules[each] for each in site.readers], scale)
            count += 1
    return count


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_folding_leaves_the_logits_alone(name: str, dtype: torch.dtype) -> None:  # E13
    for tied in (False, True):
        model = build(name, dtype=dtype, tied=tied)
        before = model(sample_ids(), use_cache=False).logits.float()
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        assert fold_everything(model, torch.Generator().manual_seed(1)) >= 2 * 2
        after = model(sample_ids(), use_cache=False).logits.float()
        changed = [key for key, value in model.state_dict().items() if not torch.equal(value, weights[key])]
        assert len(changed) > 8
        if dtype == torch.float32:
            torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
        else:
            assert float((after - before).square().mean().sqrt()) < ROUNDING[dtype]


@pytest.mark.parametrize("offset", [0, 1])
def test_a_scale_of_one_keeps_every_bit(offset: int) -> None:
    torch.manual_seed(0)
    norm, reader = nn.LayerNorm(16).to(torch.bfloat16), nn.Linear(16, 8).to(torch.bfloat16)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    before = [parameter.clone() for module in (norm, reader) for parameter in module.parameters()]
    fold = Fold(producer="n", kind="norm", rows=torch.arange(16), offset=offset)
    apply_fold(fold, norm, [reader], torch.ones(16))
    after = [parameter for module in (norm, reader) for parameter in module.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [0, 1])
def test_columns_make_up_for_the_rounding_of_a_norm(offset: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm, reader = nn.LayerNorm(64, bias=False).to(dtype), nn.Linear(64, 8, bias=False)
    norm.weight.data = (torch.randn(64) * 0.5).to(dtype)
    norm.weight.data[3] = -offset  # multiplies by zero
    old = norm.weight.detach().double() + offset
    columns = reader.weight.detach().double().clone()
    scale = torch.rand(64) + 0.5
    applied = apply_fold(Fold(producer="n", kind="norm", rows=torch.arange(64), offset=offset), norm, [reader], scale)
    new = norm.weight.detach().double() + offset
    torch.testing.assert_close(new * applied.double(), old, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(reader.weight.double(), columns * applied.double())
    torch.testing.assert_close(applied, scale, rtol=0.6 if offset else 0.01, atol=0)


def test_a_linear_producer_is_divided_by_rows() -> None:
    torch.manual_seed(0)
    values, output = nn.Linear(8, 4), nn.Linear(8, 8)
    rows = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])  # two query heads of width 2 share each key-value head
    weight, bias, columns = values.weight.clone(), values.bias.clone(), linear_weight(output).clone()
    scale = torch.tensor([2.0, 3.0, 5.0, 7.0])[rows]
    apply_fold(Fold(producer="v", kind="linear", rows=rows), values, [output], scale)
    divisor = torch.tensor([2.0, 3.0, 5.0, 7.0])
    torch.testing.assert_close(values.weight, weight / divisor[:, None])
    torch.testing.assert_close(values.bias, bias / divisor)
    torch.testing.assert_close(linear_weight(output), columns * scale)


def test_heads_that_share_a_row_share_their_scale() -> None:
    fold = Fold(producer="v", kind="linear", rows=torch.tensor([4, 5, 4, 5, 6, 6]))
    assert share_scale(fold, torch.tensor([1.0, 2.0, 3.0, 6.0, 1.0, 5.0])).tolist() == [2, 4, 2, 4, 3, 3]
    assert share_scale(None, torch.tensor([1.0, 2.0])).tolist() == [1, 2]


def test_a_fold_that_does_not_hold_is_seen_and_undone() -> None:
    torch.manual_seed(0)
    block, x = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)), torch.randn(2, 5, 8)
    before = {key: value.clone() for key, value in block.state_dict().items()}
    right = Fold(producer="b.0", kind="norm", rows=torch.arange(8))
    through_gelu = Fold(producer="b.1", kind="linear", rows=torch.arange(8))
    wrong_offset = Fold(producer="b.0", kind="norm", rows=torch.arange(8), offset=1)
    expected = block(x)
    for fold, reader, holding in (
        (right, "b.1", True),
        (through_gelu, "b.3", False),
        (wrong_offset, "b.1", False),
        (right, "b.3", False),
    ):
        assert holds(block, "b", [(fold, [reader])], lambda: block(x), expected) == holding
        assert all(torch.equal(value, before[key]) for key, value in block.state_dict().items())


def test_the_offset_of_a_norm_is_what_it_does() -> None:
    class Plus(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.layer_norm(x, (8,), 1 + self.weight, self.bias)

    class Square(nn.LayerNorm):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.layer_norm(x, (8,), self.weight.square(), self.bias)

    sample = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for kind, offset in ((nn.LayerNorm, 0), (Plus, 1), (Square, None)):
        norm = kind(8)
        norm.weight.data.normal_()
        before = norm.weight.clone()
        assert norm_offset(norm, sample) == offset
        assert torch.equal(norm.weight, before)
