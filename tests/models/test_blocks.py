"""Finding blocks, linears and the head in any model."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import MambaConfig, MambaForCausalLM
from transformers.pytorch_utils import Conv1D

from bitwright.core.errors import BitwrightError
from bitwright.models.blocks import (
    find_blocks,
    is_linear,
    linear_shape,
    linear_weight,
    linears,
    output_head,
    set_module,
)
from tests.quantization.tiny import FAMILIES, Plain, build_model

PLACES = {
    "llama": "model.layers", "gpt2": "transformer.h", "gpt_neox": "gpt_neox.layers", "opt": "model.decoder.layers",
    "mpt": "transformer.blocks", "bloom": "transformer.h", "gemma3_text": "model.layers",
}  # fmt: skip


@pytest.mark.parametrize("family", PLACES)
def test_blocks_are_found_where_they_hang(family: str) -> None:
    model = build_model(family, seed=1)
    blocks = find_blocks(model)
    assert blocks.name == PLACES[family] and len(blocks.modules) == 2
    for name, block in zip(blocks.names(), blocks.modules, strict=True):
        assert model.get_submodule(name) is block


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_is_what_makes_logits(family: str) -> None:
    model = build_model(family)
    head = output_head(model)
    assert head is not None and model.get_submodule(head[0]) is head[1] is model.get_output_embeddings()
    inside = {layer for name, block in zip(*_pairs(model), strict=True) for layer in linears(block, name)}
    assert head[0] not in inside
    assert inside | {head[0]} == {name for name, module in model.named_modules() if is_linear(module)}


def _pairs(model: nn.Module) -> tuple[tuple[str, ...], tuple[nn.Module, ...]]:
    blocks = find_blocks(model)
    return blocks.names(), blocks.modules


def test_conv1d_is_a_linear_the_other_way_round() -> None:
    conv, linear = Conv1D(6, 4), nn.Linear(4, 6)
    with torch.no_grad():
        linear.weight.copy_(linear_weight(conv))
        linear.bias.copy_(conv.bias)
    assert is_linear(conv) and linear_shape(conv) == linear_shape(linear) == (6, 4)
    x = torch.randn(3, 4)
    torch.testing.assert_close(conv(x), linear(x))
    assert not is_linear(nn.Conv1d(4, 6, 1)) and not is_linear(nn.Embedding(4, 6))


def test_linears_come_in_order_with_their_full_names() -> None:
    block = Plain(16, blocks=1).blocks[0]
    assert list(linears(block, "blocks.0")) == ["blocks.0.up", "blocks.0.down"]
    wrapped = nn.Module()
    wrapped.inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Sequential(nn.Linear(2, 2)))
    assert list(linears(wrapped, "b")) == ["b.inner.0", "b.inner.2.0"]


class Nested(nn.Module):
    """Lists inside the blocks, a list of norms, and a small list of linears beside the large one."""

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])
        self.norms = nn.ModuleList([nn.LayerNorm(64) for _ in range(9)])
        self.decoder = nn.Module()
        blocks = []
        for _ in range(2):
            block = nn.Module()
            block.experts = nn.ModuleList([nn.Linear(64, 64) for _ in range(4)])
            blocks.append(block)
        self.decoder.layers = nn.ModuleList(blocks)
        self.mixed = nn.ModuleList([nn.Linear(512, 512), nn.LayerNorm(3)])  # not every member has a linear


def test_the_outermost_list_with_most_weights_counts() -> None:
    blocks = find_blocks(Nested())
    assert blocks.name == "decoder.layers" and blocks.names() == ("decoder.layers.0", "decoder.layers.1")


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4)), nn.ModuleDict(), nn.Module()])
def test_a_model_without_blocks_is_refused_by_name(model: nn.Module) -> None:
    with pytest.raises(BitwrightError) as caught:
        find_blocks(model)
    assert caught.value.code == "BW313" and type(model).__name__ in caught.value.what and caught.value.suggestion


def test_fused_experts_are_refused_and_small_kernels_are_not() -> None:
    model = Plain(16, blocks=2)
    model.blocks[0].kernel = nn.Parameter(torch.zeros(64, 1, 4))  # of a convolution
    model.blocks[0].table = nn.Embedding(32, 16)
    model.blocks[1].decay = nn.Parameter(torch.zeros(16, 16))  # little beside the linears
    model.blocks[1].counts = nn.Parameter(torch.zeros(4, 16, 16, dtype=torch.int32), requires_grad=False)
    find_blocks(model)
    model.blocks[1].experts = nn.Parameter(torch.zeros(4, 16, 16))
    with pytest.raises(BitwrightError) as caught:
        find_blocks(model)
    assert "blocks.1.experts (4 x 16 x 16)" in caught.value.what
    del model.blocks[1].experts
    model.blocks[0].stacked = nn.Parameter(torch.zeros(1000, 16))  # most of the block
    with pytest.raises(BitwrightError, match=r"blocks\.0\.stacked"):
        find_blocks(model)


def test_blocks_that_share_layers_are_refused() -> None:
    model = Plain(16, blocks=3)
    model.blocks[2].up = model.blocks[0].up
    with pytest.raises(BitwrightError) as caught:
        find_blocks(model)
    assert caught.value.code == "BW313"
    assert "blocks.2.up" in caught.value.what and "blocks.0.up" in caught.value.what


@pytest.mark.parametrize("is_module", [True, False])
def test_layers_of_a_block_that_share_a_weight_are_refused(is_module: bool) -> None:
    """One of them would stay as it was, or be scaled for the other."""
    model = Plain(16, blocks=2)
    model.blocks[1].other = model.blocks[1].up if is_module else nn.Linear(16, 32)
    model.blocks[1].other.weight = model.blocks[1].up.weight
    with pytest.raises(BitwrightError, match=r"BW313.*blocks\.1\.other has the weight of blocks\.1\.up"):
        find_blocks(model)


def test_a_list_of_linear_layers_is_no_list_of_blocks() -> None:
    model = nn.Module()
    model.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
    with pytest.raises(BitwrightError, match=r"BW313.*no ModuleList of blocks"):
        find_blocks(model)


def test_the_first_mambas_are_refused_by_name() -> None:
    config = MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    with pytest.raises(BitwrightError, match=r"BW313.*backbone\.layers\.0\.mixer is a state space"):
        find_blocks(MambaForCausalLM(config))


def test_a_module_is_put_where_its_name_says() -> None:
    model = Plain(16, blocks=2)
    model.chain = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(3, 3)]))
    for name in ("head", "blocks.1", "blocks.0.up", "chain.0", "chain.1.0"):
        new = nn.Identity()
        set_module(model, name, new)
        assert model.get_submodule(name) is new
    assert len(model.blocks) == 2 and len(model.chain) == 2
