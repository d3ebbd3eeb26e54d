"""Sizes and bits per weight against the files and against arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from bitwright.evaluation.sizes import checkpoint_size, module_size
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.models.loading import load
from bitwright.quantization.api import quantize
from tests.evaluation.conftest import save_model

LINEARS = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64 + 3 * 64 * 96)  # of both layers
EMBEDDINGS, NORMS = 2 * 64 * 64, 5 * 64


def weight_bytes(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.glob("*.safetensors"))


def test_a_float_checkpoint(base: Path) -> None:
    size = checkpoint_size(open_checkpoint(base))
    assert size.total == weight_bytes(base)
    assert size.bits_per_weight == size.bits_per_parameter == 32


# 4 bits and a float16 scale (for each 32 weights, or each row of 64 or 96), zero points of 4 bits, or integer scales.
SCHEMES = [
    ("w4g32", 4 + 16 / 32),
    ("w4g32-asym", 4 + 20 / 32),
    ("w8g32", 8.5),
    ("nf4g32-dq", 4 + 8 / 32 + 40 / 32 / 256),
]


@pytest.mark.parametrize(("scheme", "bits"), SCHEMES)
def test_a_quantized_checkpoint(base: Path, tmp_path: Path, scheme: str, bits: float) -> None:
    report = quantize(base, tmp_path / "out", scheme=scheme, format="native")
    size = checkpoint_size(open_checkpoint(tmp_path / "out"))
    assert size.total == weight_bytes(tmp_path / "out")
    assert size.bits_per_weight == pytest.approx(bits, rel=0.01)
    assert size.bits_per_weight == pytest.approx(report.bits_per_weight, rel=0.01)
    others = 32 * (EMBEDDINGS + NORMS)
    whole = (bits * LINEARS + others) / (LINEARS + EMBEDDINGS + NORMS)
    assert size.bits_per_parameter == pytest.approx(whole, rel=0.01)


def test_biases_are_not_part_of_quantized_weights(tmp_path: Path) -> None:
    save_model(tmp_path / "base", attention_bias=True)
    quantize(tmp_path / "base", tmp_path / "out", scheme="w4g32", format="native")
    size = checkpoint_size(open_checkpoint(tmp_path / "out"))
    assert size.bits_per_weight == pytest.approx(4.5, rel=0.001)


def test_a_model_in_memory(model: LlamaForCausalLM) -> None:
    size = module_size(model)
    assert size.total == 4 * (LINEARS + EMBEDDINGS + NORMS) and size.bits_per_weight == size.bits_per_parameter == 32
    assert module_size(model.to(torch.bfloat16)).bits_per_parameter == 16


def test_a_tied_weight_counts_once() -> None:
    tied = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    tied[1].weight = tied[0].weight
    assert module_size(tied).total == 8 * 8 * 4


def test_a_quantized_model_in_memory(base: Path, tmp_path: Path) -> None:
    quantize(base, tmp_path / "out", scheme="w4g32", format="native")
    size = module_size(load(tmp_path / "out"))
    assert size.bits_per_weight == pytest.approx(4.5, rel=0.1)
    assert size.total == pytest.approx(weight_bytes(tmp_path / "out"), rel=0.1)
