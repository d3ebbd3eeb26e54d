"""float-quantized checkpoints of compressed-tensors: e4m3 weights with a scale a row, or one for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.formats.compressed_tensors import FORMAT
from bitwright.models.loading import load
from bitwright.models.quantized import QuantizedLinear
from tests.models.fused_models import QWEN, qwen_logits, saved

compressors = pytest.importorskip("compressed_tensors.compressors", reason="the package writes what is read here")
quantization = pytest.importorskip("compressed_tensors.quantization")
TOKENS = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "token", "dynamic": True}


def write(directory: Path, config: dict[str, Any], tensors: dict[str, Tensor], *, strategy: str, tokens: bool) -> None:
    """Round the matrices of the blocks as the package does; ``tensors`` then holds what they are."""
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": strategy}
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], weights=weights, input_activations=TOKENS if tokens else None
    )
    compressor = compressors.BaseCompressor.get_value_from_registry("float-quantized")
    stored: dict[str, Tensor] = {}
    for name, weight in list(tensors.items()):
        layer, _, leaf = name.rpartition(".")
        if weight.dim() != 2 or leaf != "weight" or (".layers." not in name and ".h." not in name):
            stored[name] = weight
            continue
        largest = weight.abs().amax() if strategy == "tensor" else weight.abs().amax(1, keepdim=True)
        scale = (largest / 448).reshape(1) if strategy == "tensor" else largest / 448
        state = compressor.compress({"weight": weight, "weight_scale": scale}, scheme)
        stored |= {f"{layer}.{field}": tensor.contiguous() for field, tensor in state.items()}
        tensors[name] = state["weight"].float() * scale
    group = {**scheme.model_dump(exclude={"format"}), "format": "float-quantized"}
    record = {"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups": {"group_0": group}}
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**config, "quantization_config": record}))
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=80, max_position_embeddings=64, initializer_range=0.2, **sizes)
    ).eval()


@pytest.mark.parametrize("strategy", ["channel", "tensor"])
@pytest.mark.parametrize("tokens", [False, True])
def test_what_the_package_writes_is_read_exactly(tmp_path: Path, strategy: str, tokens: bool) -> None:
    model = llama()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write(tmp_path / "q", model.config.to_dict(), tensors, strategy=strategy, tokens=tokens)
    loaded: Any = load(tmp_path / "q")
    layers = {name: layer for name, layer in loaded.named_modules() if isinstance(layer, QuantizedLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert layer.scheme.name.startswith("fp8") and ("afp8" in layer.scheme.name) == tokens
        assert torch.equal(layer.dequantize(), tensors[f"{name}.weight"]), name
    model.load_state_dict(tensors)
    ids = torch.arange(1, 41).unsqueeze(0)
    with torch.no_grad():
        found, expected = loaded(input_ids=ids).logits, model(input_ids=ids).logits
    assert (found - expected).norm() < (0.15 if tokens else 1e-5) * expected.norm()


def test_tokens_are_rounded_as_the_configuration_says(tmp_path: Path) -> None:
    """To e4m3, by the largest number of each token, as the package rounds them."""
    model = llama()
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    write(tmp_path / "q", model.config.to_dict(), tensors, strategy="channel", tokens=True)
    layer: Any = load(tmp_path / "q").get_submodule("model.layers.0.mlp.up_proj")
    x = torch.randn(7, 64, generator=torch.Generator().manual_seed(1))
    scale = x.abs().amax(1, keepdim=True) / 448
    seen = (x / scale).to(torch.float8_e4m3fn).double() * scale
    expected = seen @ tensors["model.layers.0.mlp.up_proj.weight"].double().T
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-4, atol=1e-4)


def test_a_fused_layer_of_such_numbers(tmp_path: Path) -> None:
    config = dict(QWEN)
    _, tensors = saved(tmp_path / "f", config)
    write(tmp_path / "q", config, tensors, strategy="channel", tokens=False)
    loaded: Any = load(tmp_path / "q")
    ids = list(range(1, 40))
    with torch.no_grad():
        found = loaded(input_ids=torch.tensor([ids])).logits[0].double()
    torch.testing.assert_close(found, qwen_logits(tensors, ids, False), rtol=1e-4, atol=1e-4)


REFUSED: list[tuple[dict[str, Any], Any, str]] = [
    ({"strategy": "block", "block_structure": [128, 128]}, None, "BW311.*block"),
    ({"symmetric": False}, None, "BW311.*symmetric 8-bit floats"),
    ({"num_bits": 4}, None, "BW311|BW304"),
    ({"strategy": "group", "group_size": 32}, None, "BW311.*a scale a row"),
    ({"type": "int"}, None, "BW311.*F8_E4M3"),
    ({}, {**TOKENS, "dynamic": False, "strategy": "tensor"}, "BW311.*activations"),
    ({}, {**TOKENS, "type": "int"}, "BW311.*are not read"),
    ({}, {**TOKENS, "type": ["float"]}, "BW311.*activations"),
]


@pytest.mark.parametrize(("weights", "activations", "says"), REFUSED)
def test_other_kinds_are_refused(tmp_path: Path, weights: dict[str, Any], activations: Any, says: str) -> None:
    model = llama()
    write(tmp_path / "q", model.config.to_dict(), dict(model.state_dict()), strategy="channel", tokens=False)
    config = json.loads((tmp_path / "q" / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    group["weights"] |= weights
    group["input_activations"] = activations
    (tmp_path / "q" / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitwrightError, match=says):
        load(tmp_path / "q")


@pytest.mark.parametrize("byte", [0x7F, 0xFF])
def test_numbers_that_are_none_are_refused(tmp_path: Path, byte: int) -> None:
    model = llama()
    write(tmp_path / "q", model.config.to_dict(), dict(model.state_dict()), strategy="channel", tokens=False)
    name, tensors = "model.layers.1.mlp.down_proj.weight", load_file(tmp_path / "q" / "model.safetensors")
    tensors[name].view(torch.uint8)[3, 5] = byte
    save_file(tensors, tmp_path / "q" / "model.safetensors")
    checkpoint = open_checkpoint(tmp_path / "q")
    record = FORMAT.layers(checkpoint)[name.removesuffix(".weight")]
    with pytest.raises(BitwrightError, match=rf"BW309.*{name}"):
        FORMAT.decode(checkpoint, name.removesuffix(".weight"), record)
