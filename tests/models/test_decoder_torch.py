"""The decoder that runs the model's own modules, on every architecture that it accepts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from bitwright.core.errors import ArgumentError
from bitwright.models.decoder_torch import TorchDecoder, refuse
from bitwright.models.loading import load
from bitwright.quantization.session import quantize_module
from tests.models import decoder_laws
from tests.models.architectures import build

LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
LAYERS = ["full_attention", "sliding_attention"]
CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}), ("llama", {"tied": True, "attention_bias": True, "mlp_bias": True}), ("llama48", {}),
    ("llama", {"rope_parameters": LLAMA3}), ("llama", {"rope_parameters": YARN}),
    ("mistral", {}), ("mistral", {"sliding_window": None}), ("mistral", {"sliding_window": 40}),
    ("qwen2", {}), ("qwen2", {"use_sliding_window": True, "sliding_window": 20, "layer_types": LAYERS}),
    ("qwen3", {}), ("qwen3", {"tied": True}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "fields"), CASES)
def test_it_computes_what_transformers_does(name: str, fields: dict[str, Any]) -> None:
    model = build(name, **fields)
    decoder_laws.agrees_with_transformers(TorchDecoder(model), model, 1e-5)
    decoder_laws.agrees_with_transformers(TorchDecoder(model, exact=False), model, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_fewer_bits(dtype: torch.dtype) -> None:
    model = build("qwen2", dtype=dtype)
    decoder_laws.agrees_with_transformers(TorchDecoder(model), model, 0.03)


def decoders() -> list[tuple[str, PreTrainedModel]]:
    return [
        ("llama48", build("llama48")),
        ("mistral, windows", build("mistral")),
        ("qwen3, bfloat16", build("qwen3", dtype=torch.bfloat16)),
        ("qwen2, quantized", quantize_module(build("qwen2"), scheme="w4g32")),  # type: ignore[list-item]
    ]


@pytest.mark.parametrize(("name", "model"), decoders(), ids=[name for name, _ in decoders()])
def test_a_row_depends_on_its_text_alone(name: str, model: PreTrainedModel) -> None:
    decoder = TorchDecoder(model)
    decoder_laws.does_not_depend_on_chunks(decoder)
    decoder_laws.does_not_depend_on_company(decoder)
    decoder_laws.does_not_depend_on_pages(decoder)
    decoder_laws.gives_no_logits(decoder)


@pytest.mark.parametrize("kv", ["int8", "int4", "int4-rotated", "k8v4", "fp8", "int4-g16", "none/1:int8-sym"])
def test_coded_keys_and_values_depend_on_the_text_alone(kv: str) -> None:
    decoder_laws.does_not_depend_on_chunks(TorchDecoder(build("qwen3")), kv)


def test_the_laws_can_fail() -> None:
    """All rows at once is not the same arithmetic; if it were on some machine, the tiles would be for nothing."""
    decoder = TorchDecoder(build("llama48", dtype=torch.float32), exact=False)
    with pytest.raises(AssertionError, match=r"another one in company|other logits"):
        decoder_laws.does_not_depend_on_chunks(decoder)
        decoder_laws.does_not_depend_on_company(decoder)


def test_trained_models(shared_models: Path) -> None:
    for name in ("stories260K", "wikitext-qwen2-6m"):
        model = load(shared_models / name, dtype=torch.float32)
        decoder_laws.agrees_with_transformers(TorchDecoder(model), model, 1e-5)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("gpt2", {}, "type 'gpt2'"),
        ("phi", {}, "type 'phi'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "type 'dynamic'"),
    ],
)
def test_what_it_cannot_run_is_named(name: str, fields: dict[str, Any], words: str) -> None:
    model = build(name, **fields)
    assert words in (refuse(model) or "")
    with pytest.raises(ArgumentError, match=f"BW201.*{words}"):
        TorchDecoder(model)


def test_weights_are_counted_once() -> None:
    model = build("llama", tied=True)
    expected = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert expected <= TorchDecoder(model).weight_bytes() <= expected + 4096  # and the rotary frequencies
