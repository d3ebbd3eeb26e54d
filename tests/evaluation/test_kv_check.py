"""The check before serving: a layer whose keys share a large offset is found, named, and given what it needs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.core.kv_scheme import parse_kv
from bitwright.evaluation.kv_check import KVCheck, check_kv
from bitwright.evaluation.kv_models import CachedModel
from bitwright.models.embedded_model import embedded_directory, read_text
from bitwright.models.hf import load_tokenizer
from bitwright.models.loading import load

NORM, LAYER = 600.0, 2


def text(start: int, tokens: int = 1024) -> Tensor:
    """Windows of half of them. Of a few hundred tokens the likeliest agree by chance more or less often than 97%."""
    ids = load_tokenizer(embedded_directory())(read_text("heldout")[:16000])["input_ids"]
    return torch.tensor(ids[start : start + tokens]).view(2, -1)


def model_with_biased_keys() -> Any:
    """The embedded model with what Qwen2 has: in one layer, keys share an offset far larger than what tells them apart.

    It lies in the slowest pair of channels of the rotary embedding, which the queries of that layer do not read: its
    predictions are those of a trained model.
    """
    model: Any = load("demo:", dtype=torch.float32)
    attention = model.model.layers[LAYER].self_attn
    width = attention.head_dim
    slow = [width // 2 - 1, width - 1]
    with torch.no_grad():
        bias = torch.zeros(attention.k_proj.bias.numel() // width, width)
        bias[:, slow] = torch.tensor([1.0, -1.0])
        attention.k_proj.bias += (bias * NORM / bias.norm()).flatten()
        attention.q_proj.weight.view(-1, width, attention.q_proj.in_features)[:, slow] = 0
        attention.q_proj.bias.view(-1, width)[:, slow] = 0
    return model


@pytest.fixture(scope="module")
def found() -> tuple[Any, KVCheck]:
    model = model_with_biased_keys()
    return model, check_kv(model, text(0))


def test_the_layer_is_named(found: tuple[Any, KVCheck]) -> None:
    check = found[1]
    assert check.unsafe == (LAYER,)
    assert "offset of norm 600" in check.layers[LAYER].unsafe
    assert check.layers[LAYER].key_offset == pytest.approx(NORM, rel=0.02)
    assert all(layer.key_offset < 50 for layer in check.layers if layer.layer != LAYER)


def test_naive_four_bits_fail_there_and_what_is_recommended_does_not(found: tuple[Any, KVCheck]) -> None:
    model, check = found
    rows = {row.scheme: row for row in check.schemes}
    assert rows["int4"].kl > 10 * rows[check.recommended].kl
    assert f"/{LAYER}:k8v4" in check.recommended
    assert rows[check.recommended].bytes_per_token < rows["none"].bytes_per_token / 2.5
    other = text(1100)
    with torch.no_grad():
        plain = model(input_ids=other).logits.argmax(-1)
        agreements = {
            name: float((CachedModel(model, parse_kv(name))(input_ids=other).logits.argmax(-1) == plain).float().mean())
            for name in ("int4", check.recommended)
        }
    assert agreements["int4"] < 0.95 <= agreements[check.recommended]


def test_a_usual_model_is_safe_in_four_rotated_bits() -> None:
    check = check_kv(load("demo:", dtype=torch.float32), text(0), schemes=("int4-rotated",))
    assert check.unsafe == ()
    assert check.recommended == "int4-rotated"
    assert check.to_dict()["recommended"] == "int4-rotated"
