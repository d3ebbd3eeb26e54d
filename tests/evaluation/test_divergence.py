"""Divergence and agreement against the definitions, and the laws that they obey."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaForCausalLM

from bitwright.evaluation.divergence import agreement, divergence
from bitwright.evaluation.measurement import ModelLogits, measure
from bitwright.evaluation.perplexity import log_probabilities
from bitwright.evaluation.windows import cut_text


def random_logits(seed: int, rows: int, vocabulary: int, spread: float) -> Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


def naive_divergence(reference: list[float], model: list[float]) -> float:
    def probabilities(logits: list[float]) -> list[float]:
        weights = [math.exp(logit - max(logits)) for logit in logits]
        return [weight / sum(weights) for weight in weights]

    p, q = probabilities(reference), probabilities(model)
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.floats(0.1, 20))
def test_divergence_is_that_of_the_definition(seed: int, vocabulary: int, spread: float) -> None:
    reference, model = (random_logits(seed + shift, 3, vocabulary, spread) for shift in (0, 1))
    found = divergence(log_probabilities(reference), log_probabilities(model))
    wanted = [naive_divergence(p, q) for p, q in zip(reference.tolist(), model.tolist(), strict=True)]
    assert found.tolist() == pytest.approx(wanted, rel=1e-9, abs=1e-12)
    assert bool((found > -1e-12).all())


@given(st.integers(0, 2**32 - 1), st.integers(2, 40), st.floats(0, 30), st.floats(-50, 50))
def test_a_model_does_not_diverge_from_itself(seed: int, vocabulary: int, spread: float, shift: float) -> None:
    logits = random_logits(seed, 4, vocabulary, spread)
    reference = log_probabilities(logits)
    assert bool((divergence(reference, log_probabilities(logits)) == 0).all())
    shifted = log_probabilities(logits.double() + shift)
    assert float(divergence(reference, shifted).abs().max()) < 1e-12
    assert bool(agreement(reference, shifted).all())


@pytest.mark.parametrize("size", [1e-5, 1e-4])
def test_divergences_of_eight_bits_are_resolved(size: float) -> None:
    """Small noise e on the logits gives half the variance of e under the reference, here about 1e-10 and 1e-8."""
    logits = random_logits(0, 200, 500, 3.0).double()
    noise = size * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = divergence(log_probabilities(logits), log_probabilities(logits + noise))
    p = logits.softmax(-1)
    wanted = ((p * noise.square()).sum(-1) - (p * noise).sum(-1).square()) / 2
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-15)


def test_tokens_of_probability_zero_add_nothing() -> None:
    reference = log_probabilities(torch.tensor([[0.0, -float("inf"), 1.0]]))
    model = log_probabilities(torch.tensor([[0.0, -float("inf"), 1.0]]))
    assert float(divergence(reference, model)) == 0
    assert float(divergence(reference, log_probabilities(torch.zeros(1, 3)))) > 0
    assert float(divergence(log_probabilities(torch.zeros(1, 3)), model)) == math.inf


def test_agreement_takes_the_first_of_equals() -> None:
    reference = log_probabilities(torch.tensor([[1.0, 1.0, 0.0], [0.0, 2.0, 1.0]]))
    model = log_probabilities(torch.tensor([[3.0, 1.0, 0.0], [0.0, 1.0, 2.0]]))
    assert agreement(reference, model).tolist() == [True, False]


def test_totals_over_a_text(model: LlamaForCausalLM) -> None:
    """Mean, percentile and agreement of two models, from all of their probabilities at once."""
    other = LlamaForCausalLM(model.config).eval()
    ids = torch.randint(64, (150,), generator=torch.Generator().manual_seed(3))
    text = cut_text(ids, seqlen=16, source="it")
    found = measure(ModelLogits(other, text), text, batch=3, reference=ModelLogits(model, text))
    kl: list[float] = []
    same: list[bool] = []
    for window in text.windows:
        with torch.no_grad():
            p, q = (m(input_ids=window[None]).logits[0, :-1].tolist() for m in (model, other))
        kl += [naive_divergence(a, b) for a, b in zip(p, q, strict=True)]
        same += [int(np.argmax(a)) == int(np.argmax(b)) for a, b in zip(p, q, strict=True)]
    mean, interval = found.mean_divergence() or (0.0, None)
    assert mean == pytest.approx(np.mean(kl), rel=1e-4) and interval is not None and interval[0] < mean < interval[1]
    assert found.high_divergence() == pytest.approx(np.quantile(kl, 0.99, method="inverted_cdf"), rel=1e-4)
    top1, _ = found.top1() or (0.0, None)
    assert top1 == pytest.approx(np.mean(same), abs=1.5 / len(same))
