"""Models measured through quantized caches, beside themselves without."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from bitwright.core.errors import BitwrightError
from bitwright.core.kv_scheme import parse_kv
from bitwright.evaluation.comparison import evaluate
from bitwright.evaluation.kv_models import CachedModel
from bitwright.evaluation.subjects import find_subjects
from bitwright.models.generation import generate
from bitwright.models.kv_cache import QuantizedCache
from bitwright.models.loading import load
from tests.evaluation.conftest import make_model


def test_a_window_gives_the_logits_of_token_by_token() -> None:
    model = make_model()
    ids = torch.randint(0, 64, (2, 30))
    with torch.no_grad():
        found = CachedModel(model, parse_kv("int4-rotated"))(input_ids=ids, use_cache=False).logits
        cache = QuantizedCache(model, "int4-rotated")
        steps = [model(input_ids=ids[:, [at]], past_key_values=cache, use_cache=True).logits for at in range(30)]
    torch.testing.assert_close(found, torch.cat(steps, dim=1), atol=1e-3, rtol=1e-3)


def test_schemes_are_rows_beside_the_model_without(base: Path, text: Path) -> None:
    found = evaluate([base], text=text, kv_cache=["none", "int8", "int4"])
    assert [row.name for row in found.rows] == [f"{base} kv=int8", f"{base} kv=int4", str(base)]
    kl = [row.kl_mean for row in found.rows[:2]]
    assert kl[0] is not None
    assert kl[1] is not None
    assert 0 < kl[0] < 1e-3 < kl[1]
    assert found.rows[2].is_reference


def test_with_a_reference_every_scheme_of_every_model_is_a_row(base: Path, text: Path) -> None:
    model = load(base)
    found = evaluate([("mine", model)], reference=base, text=text, kv_cache=["none", "k8v4"], tokenizer=base)
    assert [row.name for row in found.rows] == ["mine kv=none", "mine kv=k8v4", str(base)]
    assert found.rows[0].kl_mean == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("schemes", ["int8", ["int9"], [5]])
def test_what_is_no_list_of_schemes_is_refused(base: Path, text: Path, schemes: list[str]) -> None:
    with pytest.raises(BitwrightError):
        evaluate([base], text=text, kv_cache=schemes)


def test_a_model_without_a_cache_is_named(base: Path) -> None:
    bare = nn.Module()
    bare.config = load(base).config
    (subject,), _ = find_subjects([("bare", bare)], base, [parse_kv("int8")])
    with pytest.raises(BitwrightError, match="bare kv=int8 is no model of transformers"):
        subject.load(None)


def test_generate_takes_a_scheme(base: Path) -> None:
    plain = generate(base, "w1 w2 w3", max_tokens=8)
    assert generate(base, "w1 w2 w3", max_tokens=8, kv_cache="int8") == plain
    with pytest.raises(BitwrightError, match="int9"):
        generate(base, "w1", kv_cache="int9")
