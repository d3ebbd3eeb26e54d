"""Modules that nothing here was made for: torch's own layers, and linear layers of other classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.compat.neural_compressor.torch.quantization import GPTQConfig, RTNConfig
from bitwright.compat.neural_compressor.torch.quantization import quantize as quantize_by_config
from bitwright.core.errors import BitwrightError
from bitwright.models.quantized import QuantizedLinear
from bitwright.quantization.api import quantize
from bitwright.quantization.session import convert, prepare
from tests.quantization.few_steps import few_steps
from tests.quantization.tiny import Plain, build_model


class Encoder(nn.Module):
    """A model of torch's own layers, as many write it."""

    def __init__(self, *, is_container: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 32)
        layers = [nn.TransformerEncoderLayer(32, 4, 128, batch_first=True) for _ in range(2)]
        self.layers = nn.TransformerEncoder(layers[0], 2) if is_container else nn.ModuleList(layers)
        self.head = nn.Linear(32, 40)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        mask = nn.Transformer.generate_square_subsequent_mask(ids.shape[1])
        if isinstance(self.layers, nn.TransformerEncoder):
            return self.head(self.layers(x, mask=mask, is_causal=True))
        for layer in self.layers:
            x = layer(x, src_mask=mask, is_causal=True)
        return self.head(x)


@pytest.mark.parametrize("is_container", [False, True])
@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "awq", "teq", "autoround", "gptq+learned"])
def test_torchs_own_layers(algorithm: str, is_container: bool) -> None:
    model = Encoder(is_container=is_container).eval()
    ids = torch.arange(48).view(2, 24) % 40
    prepared = prepare(model, scheme="w6g16", algorithm=algorithm, options=few_steps(algorithm))
    with torch.no_grad():
        prepared(ids)
        quantized = convert(prepared)
        error = float((quantized(ids) - model(ids)).norm() / model(ids).norm())
    names = [name for name, module in quantized.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(names) == 4 and not any("out_proj" in name for name in names)
    assert 0 < error < 0.05


class Doubling(nn.Linear):
    """Does more than its weight says."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Written(nn.Linear):
    """The same product in other words."""

    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.t() + self.bias


def with_layer(kind: type[nn.Linear]) -> Plain:
    model = Plain(32)
    layer: Any = kind(32, 64)
    layer.load_state_dict(model.blocks[1].up.state_dict())
    model.blocks[1].up = layer
    return model


@pytest.mark.parametrize("algorithm", ["rtn", "gptq"])
def test_what_a_layer_does_beside_its_product_is_not_lost_in_silence(algorithm: str) -> None:
    x = torch.randn(6, 8)
    prepared = prepare(with_layer(Doubling), scheme="w4g32", algorithm=algorithm)
    prepared(x)
    with pytest.raises(BitwrightError, match=r"BW313.*blocks\.1\.up \(Doubling\) does more") as caught:
        convert(prepared)
    assert "--override blocks.1.up=float" in str(caught.value)
    assert isinstance(prepared.model.blocks[1].up, Doubling)
    for kind, rules in ((Doubling, ["blocks.1.up=float"]), (Written, [])):
        other = prepare(with_layer(kind), scheme="w4g32", algorithm=algorithm, overrides=rules)
        other(x)
        assert isinstance(convert(other).get_submodule("blocks.1.up"), kind) == bool(rules)


@pytest.mark.parametrize("config", [RTNConfig(), GPTQConfig()], ids=["rtn", "gptq"])
def test_such_layers_are_refused_by_other_names_too(config: RTNConfig | GPTQConfig) -> None:
    x = torch.randn(6, 32)
    with pytest.raises(BitwrightError, match=r"BW313.*\(Doubling\) does more"):
        quantize_by_config(nn.Sequential(Doubling(32, 8)), config, lambda model: model(x))
    inside = Plain(32)
    inside.head = Doubling(32, 8)
    with pytest.raises(BitwrightError, match=r"BW313.*head \(Doubling\) does more"):
        quantize_by_config(inside, config, lambda model: model(x[:, :8]))


def test_they_are_refused_on_their_way_to_disk(tmp_path: Path) -> None:
    model = build_model("llama")
    layer = Doubling(32, 64, bias=False)
    model.model.layers[0].mlp.up_proj = layer
    with pytest.raises(BitwrightError, match=r"BW313.*up_proj \(Doubling\) does more"):
        quantize(model, tmp_path / "out", scheme="w4g32")
    assert not (tmp_path / "out").exists()
