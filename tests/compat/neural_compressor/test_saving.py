"""The saved folder: complete, safe to read, equal to the model that was saved, and refused where it is damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.compat.neural_compressor.torch.quantization import (
    AWQConfig,
    GPTQConfig,
    HQQConfig,
    RTNConfig,
    WeightOnlyLinear,
    load,
    quantize,
    save,
)
from bitwright.compat.neural_compressor.torch.quantization.config import WeightOnlyConfig
from bitwright.core.scheme import LayerScheme
from tests.quantization.tiny import Plain, build_model

IDS = torch.arange(64).view(2, 32) % 32
CONFIGS: dict[str, WeightOnlyConfig] = {
    "rtn": RTNConfig(quant_lm_head=True),
    "rtn-asym": RTNConfig(bits=3, use_sym=False, group_size=24),
    "axis0": RTNConfig(group_dim=0),
    "nf4": RTNConfig(dtype="nf4"),
    "fp4": RTNConfig(dtype="fp4", group_size=-1),
    "double": RTNConfig(use_double_quant=True, use_sym=False),
    "g_idx": GPTQConfig(act_order=True, group_size=16),
    "hqq": HQQConfig(quant_zero=False),
    "hqq-scales": HQQConfig(quant_scale=True),
    "hqq-scales-alone": HQQConfig(quant_scale=True, quant_zero=False),
}


def make(config: WeightOnlyConfig, family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    return quantize(build_model(family, dtype=dtype), config, lambda model: model(IDS))


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(IDS).logits
    return made


def stored(folder: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = torch.load(folder / "quantized_model.pt", weights_only=True)
    return tensors


@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_loaded_is_what_was_saved(name: str, tmp_path: Path) -> None:
    """W40: with an original of other numbers, and without one."""
    model = make(CONFIGS[name])
    model.save(tmp_path)
    for again in (load(tmp_path, original_model=build_model("llama", seed=9)), load(tmp_path)):
        assert torch.equal(logits(again), logits(model))
        for layer, module in model.named_modules():
            if isinstance(module, WeightOnlyLinear):
                other = again.get_submodule(layer)
                assert isinstance(other, WeightOnlyLinear)
                assert (other.algorithm, other.scheme) == (module.algorithm, module.scheme)
                assert torch.equal(other.unpack().codes, module.unpack().codes)


def test_the_group_of_each_column_survives(tmp_path: Path) -> None:
    model = make(CONFIGS["g_idx"])
    model.save(tmp_path)
    indices = {name: tensor for name, tensor in stored(tmp_path).items() if name.endswith("g_idx")}
    assert len(indices) == 14 and all(tensor.dtype == torch.int32 for tensor in indices.values())
    again = load(tmp_path).get_submodule("model.layers.0.mlp.up_proj")
    assert isinstance(again, WeightOnlyLinear)
    index = again.unpack().group_index
    assert index is not None and torch.equal(index, indices["model.layers.0.mlp.up_proj.g_idx"])


def test_group_aware_order_needs_no_index(tmp_path: Path) -> None:
    """W17."""
    make(GPTQConfig(hybrid_act_order=True, group_size=16)).save(tmp_path)
    assert not [name for name in stored(tmp_path) if name.endswith("g_idx")]


@pytest.mark.parametrize(("family", "dtype"), [
    ("gpt2", torch.float32), ("qwen2", torch.bfloat16), ("opt", torch.float16), ("gpt_neox", torch.float32),
])  # fmt: skip
def test_every_kind_of_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Transposed layers, biases, tied embeddings, half precision: nothing is taken from the original."""
    model = make(RTNConfig(), family, dtype)
    model.save(tmp_path)
    again = load(tmp_path)
    assert torch.equal(logits(again), logits(model))
    kept = {name: tensor.dtype for name, tensor in model.state_dict().items()}
    assert {name: tensor.dtype for name, tensor in again.state_dict().items()} == kept
    if family == "qwen2":
        assert again.get_input_embeddings().weight is again.get_output_embeddings().weight
        files = (tmp_path / "quantized_model.pt").stat().st_size
        assert files < sum(tensor.numel() * 2 for tensor in build_model("qwen2", dtype=dtype).parameters())


def test_an_inserted_scale_is_saved(tmp_path: Path) -> None:
    model = make(AWQConfig(bits=3), "gpt2")
    scaled = [m for m in model.modules() if isinstance(m, WeightOnlyLinear) and m.input_scale is not None]
    assert scaled
    model.save(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_words_are_streams_of_bits() -> None:
    """W11's codes: 7 -3 -2 -1 0 1 2 3, counted from -8 and four bits each, the first in the lowest ones."""
    weight = torch.tensor([[7.0, -3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0]])
    linear = nn.Sequential(nn.Linear(8, 1, bias=False))
    linear[0].weight.data = weight
    layer = quantize(linear, RTNConfig(group_size=-1))[0]
    assert isinstance(layer, WeightOnlyLinear)
    assert int(layer.compress()["qweight"][0, 0]) & 0xFFFFFFFF == 0xBA98765F
    assert torch.equal(layer.decompress(), weight)
    again = WeightOnlyLinear.from_compressed(
        layer.compress(), LayerScheme(weight=layer.scheme.weight), (1, 8), algorithm="rtn", name="0"
    )
    assert torch.equal(again.decompress(), weight)


def test_the_same_model_gives_the_same_bytes(tmp_path: Path) -> None:
    """W33: also after it has run."""
    model = make(HQQConfig())
    model.save(tmp_path / "one")
    logits(model)
    save(model, tmp_path / "two")
    for name in ("quantized_model.pt", "qconfig.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_the_record_says_what_made_it(tmp_path: Path) -> None:
    make(RTNConfig(bits=8).set_local(".*q_proj", GPTQConfig())).save(tmp_path)
    record = json.loads((tmp_path / "qconfig.json").read_text())
    assert (record["format"], record["version"]) == ("bitwright.neural_compressor", 1)
    layer = record["layers"]["model.layers.1.self_attn.q_proj"]
    assert layer == {"algorithm": "gptq", "scheme": "w4g32", "shape": [32, 32]}
    assert record["quantization"]["rtn"]["global"]["bits"] == 8
    assert record["model"]["config"]["model_type"] == "llama"


def test_the_newer_file_name_is_read(tmp_path: Path) -> None:
    model = make(RTNConfig())
    model.save(tmp_path)
    (tmp_path / "quantized_model.pt").rename(tmp_path / "quantized_weight.pt")
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_a_model_of_ones_own_needs_its_original(tmp_path: Path) -> None:
    model = quantize(Plain(), RTNConfig())
    save(model, tmp_path)
    with pytest.raises(ValueError, match="original_model"):
        load(tmp_path)
    with torch.device("meta"):
        empty = Plain()
    x = torch.randn(3, 8)
    assert torch.equal(load(tmp_path, original_model=empty)(x), model(x))


def test_only_converted_models_are_saved(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no quantized layers"):
        save(Plain(), tmp_path)
    assert not list(tmp_path.iterdir())
