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
from tests.models.biased_keys import LAYER, NORM, model_with_biased_keys


def text(start: int, tokens: int = 1024) -> Tensor:
    """Windows of half of them. Of a few hundred tokens the likeliest agree by chance more or less often than 97%."""
    ids = load_tokenizer(embedded_directory())(read_text("heldout")[:16000])["input_ids"]
    return torch.tensor(ids[start : start + tokens]).view(2, -1)


@pytest.fixture(scope="module")
def found() -> tuple[Any, KVCheck]:
    model = model_with_biased_keys()
    return model, check_kv(model, text(0), schemes=("int4", "int4-rotated"))


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
    check = check_kv(load("demo:", dtype=torch.float32), text(0, 512), schemes=("int4-rotated",))
    assert check.unsafe == ()
    assert check.recommended == "int4-rotated"
    assert check.to_dict()["recommended"] == "int4-rotated"
