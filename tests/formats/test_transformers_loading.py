"""End to end: a model quantized and written by us, loaded by transformers with the compressed-tensors package."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.core.grid import FitOptions
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme
from bitwright.core.scheme_names import parse
from bitwright.formats.compressed_tensors import FORMAT
from bitwright.formats.records import LayerRecord
from bitwright.formats.safetensors_file import serialize
from bitwright.formats.storage import write_file

pytest.importorskip("compressed_tensors")
transformers = pytest.importorskip("transformers")

# The warnings are those of the two packages about each other.
pytestmark = pytest.mark.filterwarnings("ignore")

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "tie_word_embeddings": False,
}
TOKENS = torch.arange(40).reshape(2, 20)


def _model(architecture: str, dtype: torch.dtype) -> Any:
    torch.manual_seed(3)
    config = getattr(transformers, f"{architecture}Config")(**SIZES)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    for parameter in model.parameters():  # biases and norms too
        nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.05)
        parameter.data = parameter.data.to(dtype)  # not the buffers: rotary frequencies stay float32
    return model.eval()


def _quantize(model: Any, schemes: Mapping[str, LayerScheme], options: FitOptions | None) -> dict[str, QuantizedTensor]:
    """Every linear layer but the head, in the first scheme whose key is part of its name."""
    layers = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            scheme = next(scheme for key, scheme in schemes.items() if key in name)
            layers[name] = QuantizedTensor.quantize(module.weight.detach(), scheme.weight, options)
    return layers


def _write(
    directory: Path, model: Any, layers: Mapping[str, QuantizedTensor], schemes: Mapping[str, LayerScheme]
) -> None:
    tensors: dict[str, Tensor] = dict(model.state_dict())
    records = {}
    for name, tensor in layers.items():
        scheme = next(scheme for key, scheme in schemes.items() if key in name)
        del tensors[f"{name}.weight"]
        tensors |= FORMAT.encode(name, tensor, scheme)
        records[name] = LayerRecord(scheme, tensor.shape)
    write_file(directory / "model.safetensors", serialize(tensors))
    config = json.loads(model.config.to_json_string(use_diff=False)) | {
        "architectures": [type(model).__name__],
        "dtype": str(model.dtype).removeprefix("torch."),
        "quantization_config": FORMAT.config(records, ["lm_head"]),
    }
    (directory / "config.json").write_text(json.dumps(config))


def _dense_logits(model: Any, layers: Mapping[str, QuantizedTensor], dtype: torch.dtype) -> Tensor:
    """The same model with the numbers that the codes stand for in place of its weights."""
    with torch.no_grad():
        for name, tensor in layers.items():
            model.get_submodule(name).weight.copy_(tensor.dequantize(dtype))
        return model(TOKENS).logits


def _loaded_logits(directory: Path, **options: Any) -> Tensor:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory, **options)
    with torch.no_grad():
        return loaded(TOKENS).logits


@pytest.mark.parametrize(
    ("architecture", "names"),
    [
        ("Llama", {"": "w4g32"}),
        ("Qwen2", {"": "w4g32-sbf16"}),
        ("Llama", {"": "w3g32"}),
        ("Qwen2", {"": "w5-sf32"}),
        ("Llama", {"": "w8"}),
        ("Llama", {"mlp": "w4g32", "q_proj": "w8", "": "w6g16"}),
    ],
    ids=str,
)
def test_transformers_loads_our_checkpoint_and_gives_the_same_logits(
    tmp_path: Path, architecture: str, names: dict[str, str]
) -> None:
    schemes = {key: parse(name) for key, name in names.items()}
    model = _model(architecture, torch.float32)
    layers = _quantize(model, schemes, None)
    _write(tmp_path, model, layers, schemes)
    assert torch.equal(_loaded_logits(tmp_path), _dense_logits(model, layers, torch.float32))


def test_negative_scales_load_too(tmp_path: Path) -> None:
    schemes = {"": parse("w4g32-sf32")}
    model = _model("Llama", torch.float32)
    layers = _quantize(model, schemes, FitOptions(symmetric_range="full"))
    assert any(bool((tensor.dense_scale() < 0).any()) for tensor in layers.values())
    _write(tmp_path, model, layers, schemes)
    assert torch.equal(_loaded_logits(tmp_path), _dense_logits(model, layers, torch.float32))


def test_scales_in_the_dtype_of_the_model_load_exactly(tmp_path: Path) -> None:
    """transformers casts scales to the dtype of the model and multiplies in it: bfloat16 models need such scales."""
    schemes = {"": parse("w4g32-sbf16")}
    model = _model("Llama", torch.bfloat16)
    layers = _quantize(model, schemes, None)
    _write(tmp_path, model, layers, schemes)
    assert torch.equal(_loaded_logits(tmp_path), _dense_logits(model, layers, torch.bfloat16))


def test_asymmetric_checkpoints_load(tmp_path: Path) -> None:
    """Their configuration asks for decoding at load: version 0.20 of the package, left to itself, expects zero points
    that are not packed, and does not load even the asymmetric checkpoints that it writes.
    """
    schemes = {"": parse("w4g32-asym-sf32")}
    model = _model("Llama", torch.float32)
    layers = _quantize(model, schemes, None)
    _write(tmp_path, model, layers, schemes)
    assert torch.equal(_loaded_logits(tmp_path), _dense_logits(model, layers, torch.float32))


@pytest.mark.parametrize("name", ["w8a8", "w4g32-sf32-a8g32"])
def test_checkpoints_with_dynamic_activations_load(tmp_path: Path, name: str) -> None:
    """The weights are exact; the activations are rounded while it runs, to the package's own scale."""
    schemes = {"": parse(name)}
    model = _model("Llama", torch.float32)
    layers = _quantize(model, schemes, None)
    _write(tmp_path, model, layers, schemes)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        logits = loaded(TOKENS).logits  # the first forward decodes the weights
    for name, tensor in layers.items():
        assert torch.equal(loaded.get_submodule(name).weight, tensor.dequantize())
    dense = _dense_logits(model, layers, torch.float32)
    assert not torch.equal(logits, dense), "the activations should have been rounded"
    assert float((logits - dense).abs().max()) < 0.03 * float(dense.abs().max())
