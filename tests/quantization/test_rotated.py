"""Runs that begin with a rotation: streamed, in memory, resumed, refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.models.hf import load_tokenizer
from bitwright.models.loading import load
from bitwright.models.quantized import QuantizedLinear
from bitwright.quantization.api import quantize
from bitwright.quantization.calibration import cut_windows, tokenize
from bitwright.quantization.events import Stopped
from bitwright.quantization.session import convert, prepare
from tests.quantization.tiny import TEXT, build_model, digests, file_tensors, save_model

SAMPLES, SEQLEN = 4, 16


@pytest.fixture(params=["qwen2", "llama"], ids=["tied", "untied"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save_model(tmp_path / "model", request.param)
    (tmp_path / "text").write_text(TEXT)
    return tmp_path


def run(place: Path, output: str = "out", model: Any = None, **changes: Any) -> Path:
    arguments: dict[str, Any] = {"scheme": "w8g32", "algorithm": "rotation+gptq", "samples": SAMPLES, "seqlen": SEQLEN}
    quantize(model or place / "model", place / output, **{**arguments, "calibration": place / "text", **changes})
    return place / output


def windows(place: Path) -> Tensor:
    ids = tokenize(load_tokenizer(place / "model"), TEXT)
    return cut_windows(ids, samples=SAMPLES, seqlen=SEQLEN, seed=0, source="text").windows


@torch.no_grad()
def test_a_rotated_checkpoint_says_what_the_model_said(place: Path) -> None:
    """At 8 bits, and with its head a tensor of its own."""
    output, ids = run(place), windows(place)
    model, quantized = load(place / "model"), load(output)
    wanted, found = model(ids).logits, quantized(ids).logits
    assert float((found - wanted).norm() / wanted.norm()) < 0.03
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= file_tensors(output).keys()
    embedding = file_tensors(output)["model.embed_tokens.weight"]
    original = model.get_input_embeddings().weight
    assert not torch.allclose(embedding, original, atol=1e-2)
    torch.testing.assert_close(embedding.norm(dim=1), original.norm(dim=1), rtol=1e-4, atol=1e-5)
    assert torch.equal(quantized.model.norm.weight, torch.ones_like(quantized.model.norm.weight))


def test_an_interrupted_run_is_resumed_to_the_same_bytes(place: Path) -> None:
    whole, stopped = run(place, "whole", overrides=["lm_head=w8g32"]), 0
    while stopped < 9:
        try:
            resumed = run(place, overrides=["lm_head=w8g32"], should_stop=lambda: True)
            break
        except Stopped:
            stopped += 1
    assert stopped == 3 and digests(resumed) == digests(whole)


def test_memory_and_disk_agree(place: Path) -> None:
    prepared = prepare(load(place / "model"), scheme="w8g32", algorithm="rotation+gptq")
    for window in windows(place):
        prepared(input_ids=window[None], use_cache=False)
    in_memory, streamed = convert(prepared), load(run(place))
    layers = {name: module for name, module in streamed.named_modules() if isinstance(module, QuantizedLinear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        other = in_memory.get_submodule(name)
        assert isinstance(other, QuantizedLinear)
        assert float((layer.unpack().codes != other.unpack().codes).float().mean()) < 0.02
        torch.testing.assert_close(layer.dequantize(), other.dequantize(), rtol=0, atol=0.02)


def test_a_module_in_memory_stays_as_it_is(tmp_path: Path) -> None:
    model = build_model("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BitwrightError, match="tokenizer"):
        run(tmp_path, model=model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_cannot_be_rotated_is_refused_by_name(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "gpt2")
    (tmp_path / "text").write_text(TEXT)
    with pytest.raises(BitwrightError, match="'gpt2'") as caught:
        run(tmp_path)
    assert caught.value.code == "BW201" and not (tmp_path / "out").exists()


def test_a_rotation_is_for_all_layers_or_none(place: Path) -> None:
    with pytest.raises(BitwrightError, match="rotates the whole model"):
        run(place, algorithm="gptq", overrides=[".*down_proj=w8g32@rotation+gptq"])
