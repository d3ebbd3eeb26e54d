"""The native decoder: what transformers computes, and every row by itself, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from bitwright.core.errors import ArgumentError
from bitwright.core.kv_scheme import parse_kv
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse
from bitwright.kernels import native_library
from bitwright.models import decoder_native
from bitwright.models.decoder import Step
from bitwright.models.decoder_native import NativeDecoder
from bitwright.models.decoder_torch import TorchDecoder
from bitwright.models.loading import load
from bitwright.quantization.session import quantize_module
from tests.models import decoder_laws
from tests.models.architectures import build
from tests.models.test_decoder_torch import CASES

pytestmark = pytest.mark.skipif(native_library.missing() is not None, reason="the native kernels are not built")


def quantized(name: str, scheme: str, **fields: Any) -> PreTrainedModel:
    return quantize_module(build(name, **fields), scheme=scheme)  # type: ignore[return-value]


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_it_computes_what_transformers_does(name: str, fields: dict[str, Any]) -> None:
    model = build(name, **fields)
    decoder_laws.agrees_with_transformers(NativeDecoder(model), model, 1e-5)


def test_on_every_instruction_set(isa: str) -> None:
    model = build("qwen3", tied=True)
    decoder_laws.agrees_with_transformers(NativeDecoder(model), model, 1e-5)
    half = build("llama", dtype=torch.bfloat16, attention_bias=True)
    decoder = NativeDecoder(half)  # rounds less often than the model itself does in bfloat16
    decoder_laws.agrees_with_transformers(decoder, half.float(), 0.03)


@pytest.mark.parametrize("scheme", ["w4g32", "w8", "nf4g32", "w4g32-asym", "w3g32", "w2g32-asym-fz"])
def test_quantized_layers(isa: str, scheme: str) -> None:
    model = quantized("qwen2", scheme)
    decoder_laws.agrees_with_transformers(NativeDecoder(model), model, 1e-5)


@pytest.mark.parametrize("scheme", ["w8a8", "w4g32-a8", "w4g32-asym-a8", "w4g32-a8g32", "w8-a8g32", "w3g32-asym-a8g64"])
def test_rounded_activations(scheme: str) -> None:
    """A last bit may bring a number to the other side of a boundary: one step of its 127th, more in later layers."""
    model = quantized("qwen2", scheme)
    decoder_laws.agrees_with_transformers(NativeDecoder(model), model, 0.04)


def decoders() -> list[tuple[str, PreTrainedModel]]:
    return [
        ("llama48", build("llama48")),
        ("mistral, windows", build("mistral", sliding_window=40)),
        ("qwen3, bfloat16", build("qwen3", dtype=torch.bfloat16)),
        ("qwen2, w4g32", quantized("qwen2", "w4g32", dtype=torch.bfloat16)),
        ("qwen2, w8a8", quantized("qwen2", "w8a8")),
        ("qwen2, w4g32-a8g32", quantized("qwen2", "w4g32-a8g32")),
        ("the embedded model", load("demo:")),
    ]


@pytest.mark.parametrize("number", range(7))
def test_a_row_depends_on_its_text_alone(number: int) -> None:
    decoder = NativeDecoder(decoders()[number][1])
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            decoder_laws.does_not_depend_on_chunks(decoder)
            decoder_laws.does_not_depend_on_company(decoder)
            decoder_laws.does_not_depend_on_pages(decoder)
            decoder_laws.gives_no_logits(decoder)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("kv", ["int8", "int4", "int4-rotated", "k8v4", "none/1:int8"])
def test_coded_keys_and_values(kv: str) -> None:
    model = build("qwen3", head_dim=64)
    decoder = NativeDecoder(model)
    decoder_laws.does_not_depend_on_chunks(decoder, kv)
    reference = TorchDecoder(model)
    found, expected, exact = _logits(decoder, kv), _logits(reference, kv), _logits(reference, "none")
    # Queries and weights of 16 bits move a number by 1e-5, and then a code here and there falls on its other side: its
    # error is another one, but no larger.
    lost, lost_in_torch = ((each - exact).square().mean() for each in (found, expected))
    assert lost <= 1.1 * lost_in_torch and (found - expected).square().mean() <= 0.02 * lost_in_torch


def test_small_rotated_heads_in_four_bits_are_refused() -> None:
    """Their offset has a pattern that only attention in torch knows."""
    with pytest.raises(ArgumentError, match="rotated head of 16"):
        NativeDecoder(build("qwen3", head_dim=16)).new_cache(1, parse_kv("int4-rotated"))


def _logits(decoder: Any, kv: str) -> torch.Tensor:
    text = decoder_laws.random_text(70, decoder.shape.vocabulary, [2, 0, 1])
    return decoder_laws.run(decoder, decoder.new_cache(3, parse_kv(kv)), [decoder_laws.Piece(text, 70)])[0]


def test_a_rounded_head_is_the_embedding_too() -> None:
    """As if the model's shared weight had been rounded itself."""
    model = build("qwen2", tied=True)
    decoder = NativeDecoder(model, head=parse("w8"))
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight.copy_(QuantizedTensor.quantize(weight.float(), parse("w8").weight).dequantize())
    decoder_laws.agrees_with_transformers(decoder, model, 1e-5)
    assert decoder.weight_bytes() < NativeDecoder(model).weight_bytes()


def test_released_weights_are_in_memory_once() -> None:
    model, again = build("llama"), build("llama")
    decoder = NativeDecoder(model, release=True)
    decoder_laws.agrees_with_transformers(decoder, again, 1e-5)
    layers = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear)]
    assert layers and all(layer.weight.numel() == 0 for layer in layers)


def test_tokens_that_are_not_finite_spoil_their_own_text_alone() -> None:
    for scheme in ("w4g32", "w8a8"):
        model = quantized("qwen2", scheme)
        with torch.no_grad():
            model.get_input_embeddings().weight[5] = torch.nan
        decoder = NativeDecoder(model)
        texts = [decoder_laws.Text([1, 2, 3], [0]), decoder_laws.Text([1, 5, 3], [1])]
        found = decoder_laws.run(decoder, decoder.new_cache(3), [decoder_laws.Piece(text, 3) for text in texts])
        piece = decoder_laws.Piece(decoder_laws.Text([1, 2, 3], [2]), 3)
        alone = decoder_laws.run(decoder, decoder.new_cache(3), [piece])
        assert torch.equal(found[0], alone[0])
        assert found[1][0].isfinite().all()
        assert found[1][1:].isnan().all()


def test_steps_that_do_not_fit_are_refused() -> None:
    decoder = NativeDecoder(build("llama"))
    cache, vocabulary = decoder.new_cache(2), decoder.shape.vocabulary
    good = Step(
        tokens=torch.tensor([1, 2, 3]), positions=torch.arange(3, dtype=torch.int32),
        starts=torch.tensor([0, 3], dtype=torch.int32), lengths=torch.tensor([3], dtype=torch.int32),
        pages=torch.tensor([[1]], dtype=torch.int32), outputs=torch.tensor([2], dtype=torch.int32),
    )  # fmt: skip
    assert decoder.forward(good, cache).shape == (1, vocabulary)
    for name, value in (
        ("tokens", [1, 2, vocabulary]), ("tokens", [-1, 2, 3]), ("positions", [0, 1, 3]), ("starts", [0, 4]),
        ("lengths", [4]), ("lengths", [99]), ("pages", [[2]]), ("pages", [[-1]]), ("outputs", [3]), ("outputs", [-1]),
    ):  # fmt: skip
        bad = replace(good, **{name: torch.tensor(value, dtype=getattr(good, name).dtype)})
        with pytest.raises(ValueError, match="out of range"):
            decoder.forward(bad, cache)
    for name in ("tokens", "positions", "outputs"):
        with pytest.raises(ValueError, match=r"int64|BW201"):
            decoder.forward(replace(good, **{name: getattr(good, name).double()}), cache)


def test_what_is_refused() -> None:
    assert "gpt2" in str(decoder_native.refuse(build("gpt2")))
    gelu = build("llama")
    gelu.config.hidden_act = "gelu"
    assert "gelu" in str(decoder_native.refuse(gelu))
    with pytest.raises(ArgumentError, match=r"BW201.*gelu"):
        NativeDecoder(gelu)
    axis = quantized("llama", "w4g32-axis0")
    assert "layer 0, self_attn.q_proj: is run by the reference kernel" in str(decoder_native.refuse(axis))
    with pytest.raises(ArgumentError, match=r"BW201.*fp8"):
        NativeDecoder(build("llama")).new_cache(1, parse_kv("fp8"))
    with pytest.raises(ArgumentError, match=r"BW201.*groups of 48"):
        NativeDecoder(build("llama"), head=parse("w4g48"))


def test_trained_models(shared_models: Path) -> None:
    for name in ("stories260K", "wikitext-qwen2-6m", "BabyLlama-361-0.97M"):
        model = load(shared_models / name, dtype=torch.float32)
        decoder_laws.agrees_with_transformers(NativeDecoder(model), model, 1e-5)
