"""Four-bit weights with fp8 activations: what is measured, what is computed, and what survives."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.compat.neural_compressor.torch.quantization import (
    AWQConfig,
    GPTQConfig,
    HybridGPTQConfig,
    RTNConfig,
    WeightOnlyLinear,
    convert,
    finalize_calibration,
    load,
    prepare,
    quantize,
)
from bitwright.core.errors import BitwrightError, Notice
from tests.quantization.tiny import build_model

IDS = torch.arange(64).view(2, 32) % 32


@pytest.fixture
def model() -> nn.Module:
    return quantize(build_model("llama"), GPTQConfig(fp8_aware=True), lambda model: model(IDS))


@pytest.fixture
def config(tmp_path: Path) -> HybridGPTQConfig:
    return HybridGPTQConfig(dump_stats_path=str(tmp_path / "measure"))


def measured(model: nn.Module, config: HybridGPTQConfig) -> nn.Module:
    prepare(model, config)
    model(IDS)
    finalize_calibration(model)
    return model


def fp8(values: Tensor) -> Tensor:
    return values.clamp(-448, 448).to(torch.float8_e4m3fn).double()


def test_inputs_are_measured_and_rounded(model: nn.Module, config: HybridGPTQConfig) -> None:
    """The layer against products of e4m3 numbers summed in float64; its scale against what it read."""
    name = "model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    assert isinstance(layer, WeightOnlyLinear)
    read: list[Tensor] = []
    handle: Any = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    measured(model, config)
    handle.remove()
    largest = float(read[0].abs().amax())
    assert json.loads(config.stats_file.read_text())["maxima"][name] == largest
    float_output = layer(read[0]).detach()
    assert convert(model, config) is model
    scale = float(model.get_buffer(f"{name}.activation_scale"))
    assert scale == 2.0 ** math.ceil(math.log2(largest / 240)) and largest <= 240 * scale
    weight = layer.decompress().double()
    step = 2.0 ** math.ceil(math.log2(float(weight.abs().amax()) / 224))
    assert torch.equal(fp8(weight / step) * step, weight)  # already multiples of e4m3 numbers
    expected = fp8(read[0] / scale) @ weight.t() * scale
    assert torch.allclose(layer(read[0]).double(), expected, rtol=1e-5, atol=1e-6)
    assert 0 < float((layer(read[0]) - float_output).norm() / float_output.norm()) < 0.05


def test_the_whole_model_stays_close(model: nn.Module, config: HybridGPTQConfig) -> None:
    with torch.no_grad():
        before = model(IDS).logits
        after = convert(measured(model, config), config)(IDS).logits
    assert 0 < float((after - before).norm() / before.norm()) < 0.1


def test_inputs_are_measured_as_they_are_multiplied(config: HybridGPTQConfig) -> None:
    """A vector that AWQ could not fold makes inputs larger or smaller before they are rounded."""
    model = quantize(build_model("gpt2"), AWQConfig(), lambda model: model(IDS))
    scaled = [(name, layer) for name, layer in model.named_modules() if getattr(layer, "input_scale", None) is not None]
    name, layer = scaled[0]
    assert isinstance(layer, WeightOnlyLinear) and layer.input_scale is not None
    layer.input_scale = layer.input_scale * 64
    read: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0] * layer.input_scale))
    measured(model, config)
    assert json.loads(config.stats_file.read_text())["maxima"][name] == float(read[0].abs().amax())
    with pytest.warns(Notice, match="fp8_aware"):
        convert(model, config)
    x = read[0] / layer.input_scale
    expected = read[0] @ layer.decompress().t() + layer.bias
    assert 0 < float((layer(x) - expected).norm() / expected.norm()) < 0.1


def test_measuring_changes_nothing(model: nn.Module, config: HybridGPTQConfig) -> None:
    before = model(IDS).logits
    assert torch.equal(prepare(model, config)(IDS).logits, before)
    finalize_calibration(model)
    assert torch.equal(model(IDS).logits, before)


def test_statistics_are_kept_and_so_is_the_result(model: nn.Module, config: HybridGPTQConfig, tmp_path: Path) -> None:
    model.save(tmp_path / "w4")  # type: ignore[operator]
    made = convert(measured(model, config), config)
    made.save(tmp_path / "w4a8")  # type: ignore[operator]
    later = convert(load(tmp_path / "w4"), config)  # from the file, in another process perhaps
    for other in (later, load(tmp_path / "w4a8")):
        assert torch.equal(other(IDS).logits, made(IDS).logits)


@pytest.mark.parametrize(("method", "scale"), [
    ("maxabs_hw", 0.5), ("maxabs_pow2", 0.5), ("maxabs_arbitrary", 0.4), ("unit_scale", 1.0),
])  # fmt: skip
def test_how_a_maximum_becomes_a_scale(method: str, scale: float) -> None:
    config = HybridGPTQConfig(scale_method=method)
    assert config.scale(96.0) == pytest.approx(scale)
    assert config.scale(0.0) == 1.0


@pytest.mark.parametrize(("fields", "count"), [
    ({"blocklist": {"names": ["q_proj", r"model\.layers\.1\..*"]}}, 6), ({"allowlist": {"names": [".*down_proj"]}}, 2),
    ({"allowlist": {"types": ["Linear"], "names": []}}, 14), ({"allowlist": {"types": [], "names": []}}, 14),
])  # fmt: skip
def test_layers_are_chosen_by_lists(
    model: nn.Module, config: HybridGPTQConfig, fields: dict[str, Any], count: int
) -> None:
    for name, value in fields.items():
        setattr(config, name, value)
    made = convert(measured(model, config), config)
    rounded = [m for m in made.modules() if isinstance(m, WeightOnlyLinear) and m.activation_scale is not None]
    assert len(rounded) == count


def test_weights_that_are_no_fp8_multiples_are_rounded_with_a_notice(config: HybridGPTQConfig) -> None:
    model = measured(quantize(build_model("llama"), RTNConfig()), config)
    with pytest.warns(Notice, match="fp8_aware"):
        convert(model, config)


def test_a_layer_that_read_nothing_keeps_float_inputs(model: nn.Module, config: HybridGPTQConfig) -> None:
    measured(model, config)
    model.__dict__["_bitwright_measurement"].maxima.pop("model.layers.0.mlp.up_proj")
    with pytest.warns(Notice, match=r"layers\.0\.mlp\.up_proj"):
        made = convert(model, config)
    layer = made.get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(layer, WeightOnlyLinear) and layer.activation_scale is None


def test_steps_out_of_order_are_refused(model: nn.Module, config: HybridGPTQConfig) -> None:
    with pytest.raises(ValueError, match="no quantized layers"):
        prepare(build_model("llama"), config)
    with pytest.raises(ValueError, match="nothing is being measured"):
        finalize_calibration(model)
    with pytest.raises(BitwrightError, match="nothing was measured on this model"):
        convert(model, config)
    prepare(model, config)
    with pytest.raises(BitwrightError, match="was not run"):
        finalize_calibration(model)
    with pytest.raises(ValueError, match="not finished"):
        convert(model, config)
    for mode, call in (("QUANTIZE", prepare), ("MEASURE", convert)):
        config.mode = mode
        with pytest.raises(ValueError, match=f"mode {mode}"):
            call(model, config)


@pytest.mark.parametrize(("text", "words"), [
    ("{", "cannot read measure.json"), ("{}", "no maxima"),
    ('{"format": "bitwright.activation_maxima", "version": 2, "maxima": {}}', "version 1"),
    ('{"format": "bitwright.activation_maxima", "version": 1, "maxima": {"a": -1}}', "no maxima"),
])  # fmt: skip
def test_a_damaged_file_is_refused(model: nn.Module, config: HybridGPTQConfig, text: str, words: str) -> None:
    config.stats_file.write_text(text)
    with pytest.raises(BitwrightError, match=words):
        convert(model, config)


def test_configurations_are_checked_and_survive_json(tmp_path: Path) -> None:
    config = HybridGPTQConfig(mode="MEASURE", blocklist={"types": [], "names": ["lm_head"]})
    config.to_json_file(tmp_path / "measure.json")
    assert HybridGPTQConfig.from_json_file(tmp_path / "measure.json") == config
    for fields in ({"mode": "measure"}, {"observer": "mse"}, {"allowlist": {"layers": []}}, {"scale_method": "best"}):
        with pytest.raises(ValueError, match=f"{next(iter(fields))} is"):
            HybridGPTQConfig(**fields)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="observers"):
        HybridGPTQConfig.from_dict({"observers": "maxabs"})


def test_inputs_that_are_not_finite_are_refused(model: nn.Module, config: HybridGPTQConfig) -> None:
    prepare(model, config)
    embedding = model.get_submodule("model.embed_tokens")
    assert isinstance(embedding, nn.Embedding)
    embedding.weight.data[3] = torch.inf
    with pytest.raises(BitwrightError, match=r"BW601.*layers\.0"):
        model(IDS)
