"""What could not be folded: a multiplier of a layer's input, stored beside the layer and applied while running."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.core.scheme_names import parse
from bitwright.models.loading import load
from tests.models.checkpoints import ARCHITECTURES, dequantized, save_quantized
from tests.models.test_loading import block_linears, logits


def with_input_scale(directory: Path, name: str, scale: Tensor) -> None:
    path = directory / "model.safetensors"
    save_file(load_file(path) | {f"{name}.input_scale": scale}, path)


def test_an_input_scale_is_loaded(tmp_path: Path) -> None:
    model = ARCHITECTURES["qwen2"]().eval()
    tensors = save_quantized(model, tmp_path, dict.fromkeys(block_linears(model), parse("w8")))
    name = block_linears(model)[0]
    scale = torch.rand(tensors[name].shape[1]) + 0.5
    with_input_scale(tmp_path, name, scale)
    loaded = load(tmp_path)
    module = loaded.get_submodule(name)
    assert isinstance(module.input_scale, Tensor)
    assert torch.equal(module.input_scale, scale)
    reference = dequantized(model, tensors)
    with torch.no_grad():
        weight = reference.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.mul_(scale)
    torch.testing.assert_close(logits(loaded), logits(reference), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("format", "scale", "code"),
    [
        ("compressed-tensors", torch.ones(64), "BW303"),
        ("native", torch.ones(63), "BW304"),
        ("native", torch.ones(64, dtype=torch.float16), "BW304"),
        ("native", torch.full((64,), torch.nan), "BW309"),
    ],
)
def test_an_input_scale_that_does_not_belong_is_refused(format: str, scale: Tensor, code: str, tmp_path: Path) -> None:
    model = ARCHITECTURES["qwen2"]().eval()
    name = block_linears(model)[0]
    save_quantized(model, tmp_path, {name: parse("w8")}, format=format)
    with_input_scale(tmp_path, name, scale)
    with pytest.raises(BitwrightError) as caught:
        load(tmp_path)
    assert caught.value.code == code
