"""Preparing, running and converting: any model, in place and not; what stays as it was; what is said when it fails."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.compat.neural_compressor.torch import load_empty_model
from bitwright.compat.neural_compressor.torch.quantization import (
    AutoRoundConfig,
    AWQConfig,
    GPTQConfig,
    HQQConfig,
    RTNConfig,
    TEQConfig,
    WeightOnlyLinear,
    convert,
    load,
    prepare,
    quantize,
)
from bitwright.compat.neural_compressor.torch.quantization.config import WeightOnlyConfig
from bitwright.core.errors import BitwrightError, Notice
from bitwright.quantization import session
from tests.quantization.tiny import Plain, build_model, save_model

IDS = torch.arange(64).view(2, 32) % 32
CONFIGS: dict[str, WeightOnlyConfig] = {
    "rtn": RTNConfig(), "gptq": GPTQConfig(act_order=True), "awq": AWQConfig(), "hqq": HQQConfig(),
    "autoround": AutoRoundConfig(iters=3),
}  # fmt: skip


def run(model: nn.Module) -> None:
    model(IDS)


def same(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, WeightOnlyLinear)]


@pytest.mark.parametrize("name", CONFIGS)
def test_one_call_is_the_three_together(name: str) -> None:
    """W43, with the source left as it was."""
    model = build_model("llama")
    before = copy.deepcopy(model.state_dict())
    at_once = quantize(model, CONFIGS[name], run, inplace=False)
    assert same(model.state_dict(), before) and not layers(model)
    assert not model._forward_pre_hooks and not hasattr(model, "save")
    prepared = prepare(model, CONFIGS[name])
    assert prepared is model
    run(prepared)
    converted = convert(prepared)
    assert converted is model and not model._forward_pre_hooks
    assert same(converted.state_dict(), at_once.state_dict())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_copy_of_a_prepared_model_is_converted(name: str) -> None:
    prepared = prepare(build_model("llama"), CONFIGS[name], inplace=False)
    run(prepared)
    one = convert(prepared, inplace=False)
    assert not layers(prepared) and len(layers(one)) == 14
    assert same(one.state_dict(), convert(prepared).state_dict())


def test_it_is_what_bitwright_makes() -> None:
    mine = quantize(build_model("llama"), RTNConfig(bits=3, use_sym=False, use_mse_search=True))
    other = session.quantize_module(build_model("llama"), scheme="w3g32-asym", options={"search": True})
    assert torch.equal(mine(IDS).logits, other(IDS).logits)


def test_a_prepared_model_is_still_the_model() -> None:
    model = build_model("llama")
    expected = model(IDS).logits
    prepared = prepare(model, GPTQConfig())
    assert type(prepared) is type(model) and prepared.config is model.config
    assert torch.equal(prepared(input_ids=IDS).logits, expected)
    assert prepared.generate(IDS[:1, :4], max_new_tokens=2, do_sample=False).shape == (1, 6)


def test_generated_texts_calibrate_with_their_beginnings() -> None:
    one, other = (prepare(build_model("llama"), GPTQConfig()) for _ in range(2))
    one.generate(IDS[:, :20], max_new_tokens=3, do_sample=False)
    other(IDS[:, :20])
    assert same(convert(one).state_dict(), convert(other).state_dict())


def test_shorter_last_groups_are_quantized_too() -> None:
    """W8: 70 input features in groups of 32."""
    made = quantize(nn.Sequential(nn.Linear(70, 12), nn.ReLU()), RTNConfig(group_size=32))[0]
    assert isinstance(made, WeightOnlyLinear)
    assert made.compress()["scales"].shape == (12, 3) and made.decompress().shape == (12, 70)


class Branches(nn.Module):
    """No blocks, keywords for arguments, a layer that never runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.idle = nn.Linear(32, 48), nn.Linear(48, 16, bias=False), nn.Linear(8, 8)

    def forward(self, x: Tensor, gain: float = 1.0) -> Tensor:
        return self.second(torch.relu(self.first(x))) * gain


@pytest.mark.parametrize("name", CONFIGS)
def test_models_without_blocks(name: str) -> None:
    x = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    model = Branches()
    made = quantize(model, CONFIGS[name], lambda model: model(gain=2.0, x=x), inplace=False)
    assert layers(made) == ["first", "second", "idle"]
    with torch.no_grad():
        error = float((made(x) - model(x)).norm() / model(x).norm())
    assert 0 < error < 0.12


class Loss(Branches):
    """Returns a dictionary, as models with a loss do."""

    def forward(self, x: Tensor, gain: float = 1.0) -> Any:
        return {"loss": None, "logits": super().forward(x, gain)}


class Batched(Branches):
    """Takes a dictionary."""

    def forward(self, batch: Any) -> Tensor:  # type: ignore[override]
        return super().forward(batch["x"])


def test_models_without_blocks_may_return_more_than_a_tensor_and_must_take_one() -> None:
    x = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    plain = quantize(Branches(), CONFIGS["gptq"], lambda model: model(x))
    made = quantize(Loss(), CONFIGS["gptq"], lambda model: model(x))
    with torch.no_grad():
        assert torch.equal(made(x)["logits"], plain(x))
    assert layers(quantize(Batched(), CONFIGS["rtn"], lambda model: model({"x": x}))) == ["first", "second", "idle"]
    with pytest.raises(BitwrightError, match=r"BW313.*Batched is given a dict"):
        quantize(Batched(), CONFIGS["gptq"], lambda model: model({"x": x}))


def test_layers_outside_the_blocks_are_quantized_with_their_own_statistics() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    made = quantize(Plain(), GPTQConfig(bits=3, group_size=-1), lambda model: model(x), inplace=False)
    assert len(layers(made)) == 8
    nearest = quantize(Plain(), RTNConfig(bits=3, group_size=-1))
    with torch.no_grad():
        error = [float((model.embed(x) - Plain().embed(x)).norm()) for model in (made, nearest)]
    assert error[0] < error[1]


@pytest.mark.parametrize("name", ["gptq", "awq", "autoround"])
def test_no_data_is_an_error_and_the_model_can_still_be_run(name: str) -> None:
    model = build_model("llama")
    before = copy.deepcopy(model.state_dict())
    prepared = prepare(model, CONFIGS[name])
    with pytest.raises(BitwrightError, match="never run"):
        convert(prepared)
    assert same(model.state_dict(), before)
    run(prepared)
    assert len(layers(convert(prepared))) == 14


def test_no_data_for_layers_outside_blocks_is_an_error_too() -> None:
    config = RTNConfig().set_local("embed", GPTQConfig())
    with pytest.raises(BitwrightError, match="BW401"):
        quantize(Plain(), config)


def test_calls_out_of_order_are_refused() -> None:
    model = build_model("llama")
    with pytest.raises(ValueError, match="not prepared"):
        convert(model)
    assert len(layers(convert(model, RTNConfig()))) == 14
    prepared = prepare(build_model("llama"), RTNConfig())
    with pytest.raises(ValueError, match="prepared already"):
        prepare(prepared, RTNConfig())


def test_a_prepared_model_has_its_configuration() -> None:
    prepared = prepare(build_model("llama"), RTNConfig(bits=3))
    with pytest.raises(BitwrightError, match=r"BW201.*another quant_config"):
        convert(prepared, RTNConfig(bits=8))
    assert "qconfig" not in prepared.__dict__
    assert layers(convert(prepared, {"rtn": RTNConfig(bits=3).to_dict()}))


def test_samples_and_their_length_are_limited() -> None:
    config = AutoRoundConfig(n_samples=3, seqlen=16, iters=1)
    one = prepare(build_model("llama"), config)
    for _ in range(4):
        one(input_ids=IDS, attention_mask=torch.ones_like(IDS))
    other = prepare(build_model("llama"), config)
    other(input_ids=IDS[:, :16], attention_mask=torch.ones_like(IDS)[:, :16])
    other(input_ids=IDS[:1, :16], attention_mask=torch.ones_like(IDS)[:1, :16])
    assert same(convert(one).state_dict(), convert(other).state_dict())


def test_positions_for_all_rows_are_cut_with_them() -> None:
    config, positions = AutoRoundConfig(iters=2, seqlen=8), torch.arange(32)[None]
    made = quantize(build_model("llama"), config, lambda model: model(IDS, position_ids=positions))
    other = quantize(build_model("llama"), config, lambda model: model(IDS))
    assert same(made.state_dict(), other.state_dict())


def test_blocks_are_tuned_together() -> None:
    """Four steps for two blocks at once are other steps than four for each."""
    one, two = (
        quantize(build_model("llama"), AutoRoundConfig(iters=20, bits=2, n_blocks=count), run) for count in (1, 2)
    )
    nearest = quantize(build_model("llama"), AutoRoundConfig(iters=0, bits=2), run)
    with torch.no_grad():
        goal = build_model("llama")(IDS).logits
        error, together, start = (float((model(IDS).logits - goal).norm()) for model in (one, two, nearest))
    assert error < start and together < start and error != together


def test_group_aware_order_takes_whole_rows() -> None:
    """W17: also with one group for each output channel."""
    made = quantize(build_model("llama"), GPTQConfig(hybrid_act_order=True, group_size=-1), run)
    for layer in made.modules():
        if isinstance(layer, WeightOnlyLinear):
            assert layer.scheme.name == "w4" and layer.unpack().group_index is None


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_trained_scales_are_those_that_are_stored(family: str) -> None:
    """The converted model computes what the training computed, folded or with an inserted multiplication."""
    model = build_model(family)
    weights = copy.deepcopy(model.state_dict())
    prepared = prepare(model, TEQConfig(bits=3), example_inputs={"input_ids": IDS})
    scales = [parameter for parameter in prepared.parameters() if parameter.requires_grad]
    nearest = quantize(build_model(family), RTNConfig(bits=3))
    assert scales and torch.equal(prepared(IDS).logits, nearest(IDS).logits)
    torch.autograd.backward([prepared(IDS).logits.square().mean()])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for scale in scales:
            scale.mul_(0.5 + torch.rand(scale.shape, generator=generator))
        trained = prepared(IDS).logits
    made = convert(prepared)
    assert all(parameter.grad is None for parameter in made.parameters())
    for name in ("lm_head.weight", "transformer.wte.weight", "model.embed_tokens.weight"):
        if name in weights:
            assert torch.equal(made.state_dict()[name], weights[name])
    assert torch.allclose(made(IDS).logits, trained, atol=1e-5)
    assert not torch.allclose(made(IDS).logits, nearest(IDS).logits, atol=1e-3)


@pytest.mark.parametrize("is_cleared", [False, True])
def test_a_training_loop_may_clear_gradients_when_it_likes(is_cleared: bool) -> None:
    """Before or after each step: what was trained is what counts, and nothing is trained anew."""
    prepared = prepare(build_model("llama"), TEQConfig(bits=3), example_inputs={"input_ids": IDS})
    optimizer = torch.optim.SGD([each for each in prepared.parameters() if each.requires_grad], lr=0.5)
    torch.autograd.backward([prepared(IDS).logits.square().mean()])
    optimizer.step()
    if is_cleared:
        optimizer.zero_grad()
    with torch.no_grad():
        trained = prepared(IDS).logits
    assert torch.allclose(convert(prepared)(IDS).logits, trained, atol=1e-5)


class Residual(Plain):
    """Adds to its hidden states what each block makes of them: its blocks do not simply follow each other."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


class Chain(nn.Module):
    """Linear layers in a list, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(32, 48), nn.Linear(48, 48), nn.Linear(48, 16)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def test_a_list_of_layers_is_no_list_of_blocks() -> None:
    """AutoRound then has a block to learn by, instead of layers that it can only round to nearest."""
    x = torch.randn(48, 32, generator=torch.Generator().manual_seed(1))
    learned = quantize(Chain(), AutoRoundConfig(scheme="W2A16G16", iters=20), lambda model: model(x))
    nearest = quantize(Chain(), RTNConfig(bits=2, group_size=16))
    with torch.no_grad():
        error = [float((made(x) - Chain()(x)).norm()) for made in (learned, nearest)]
    assert len(layers(learned)) == 3 and error[0] < 0.8 * error[1]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_model_that_works_between_its_blocks_is_one_block(name: str) -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    model = Residual()
    if name in ("rtn", "hqq"):
        made = quantize(model, CONFIGS[name], lambda model: model(x), inplace=False)
    else:
        with pytest.warns(Notice, match=r"blocks\.1 is not given .* single block"):
            made = quantize(model, CONFIGS[name], lambda model: model(x), inplace=False)
    assert len(layers(made)) == 8
    with torch.no_grad():
        error = float((made(x) - model(x)).norm() / model(x).norm())
    assert 0 < error < 0.12


def test_scales_of_such_a_model_can_be_trained() -> None:
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(1))
    with pytest.warns(Notice, match="single block"):
        prepared = prepare(Residual(), TEQConfig(bits=3), example_inputs=x)
    optimizer = torch.optim.SGD([each for each in prepared.parameters() if each.requires_grad], lr=0.5)
    torch.autograd.backward([prepared(x).square().mean()])
    optimizer.step()
    with torch.no_grad():
        trained = prepared(x)
        assert torch.allclose(convert(prepared)(x), trained, atol=1e-5)


def test_layer_by_layer_holds_one_block_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W35: the result is that of a model in memory, and blocks are empty but for the one that is worked on."""
    model = save_model(tmp_path, "qwen2", num_hidden_layers=3)
    held: list[int] = []
    work_on = session.quantize_block

    def watch(work: Any) -> Any:
        floats = [module for module in work.model.model.layers.modules() if type(module) is nn.Linear]
        held.append(sum(not layer.weight.is_meta for layer in floats))
        return work_on(work)

    monkeypatch.setattr(session, "quantize_block", watch)
    config = GPTQConfig(use_layer_wise=True)
    empty = load_empty_model(tmp_path)
    assert all(parameter.is_meta for parameter in empty.parameters())
    prepared = prepare(empty, config)
    prepared(IDS)
    assert sum(not parameter.is_meta for parameter in prepared.model.layers.parameters()) == 0
    made = convert(prepared)
    assert held == [7, 7, 7]
    monkeypatch.undo()
    assert torch.equal(made(IDS).logits, quantize(model, config, run)(IDS).logits)
    made.save(tmp_path / "saved")
    assert torch.equal(load(tmp_path / "saved")(IDS).logits, made(IDS).logits)


@pytest.mark.parametrize("config", [RTNConfig(), RTNConfig(use_layer_wise=True)])
def test_an_empty_model_says_where_its_weights_are(tmp_path: Path, config: RTNConfig) -> None:
    model = save_model(tmp_path, "llama")
    empty = copy.deepcopy(load_empty_model(tmp_path))
    assert torch.equal(quantize(empty, config)(IDS).logits, quantize(model, config)(IDS).logits)
    with torch.device("meta"):
        stranger = build_model("llama")
    with pytest.raises(BitwrightError, match="model_path"):
        prepare(stranger, config)
    config.model_path = str(tmp_path)
    assert len(layers(quantize(stranger, config))) == 14
