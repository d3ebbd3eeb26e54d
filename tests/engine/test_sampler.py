"""Tokens by chance follow the distribution that the options describe, restated here in float64."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.engine.options import RequestOptions
from bitwright.engine.sampler import Sampler

pytestmark = pytest.mark.usefixtures("kernels")  # what is drawn natively and what is not keep the same laws


def restated(logits: np.ndarray, prompt: list[int], answer: list[int], options: RequestOptions) -> np.ndarray:
    """The probabilities of the next token, one rule after the other."""
    x = logits.astype(np.float64).copy()
    for token in set(prompt) | set(answer):
        x[token] = x[token] / options.repetition_penalty if x[token] > 0 else x[token] * options.repetition_penalty
    for token in set(answer):
        x[token] -= options.presence_penalty + options.frequency_penalty * answer.count(token)
    for token, bias in options.logit_bias.items():
        x[token] += bias
    if options.temperature == 0:
        return np.eye(len(x))[x.argmax()]
    order = sorted(range(len(x)), key=lambda token: (-x[token], token))
    kept = order[: options.top_k] if options.top_k else order
    weight = {token: math.exp((x[token] - x[order[0]]) / options.temperature) for token in kept}
    total, before, inside = sum(weight.values()), 0.0, []
    for token in kept:
        if before < options.top_p * total and weight[token] >= options.min_p:
            inside.append(token)
        before += weight[token]
    probabilities = np.zeros(len(x))
    for token in inside:
        probabilities[token] = weight[token] / sum(weight[each] for each in inside)
    return probabilities


CASES: list[dict[str, Any]] = [
    {"temperature": 1.0}, {"temperature": 0.3}, {"temperature": 1.0, "top_k": 3}, {"temperature": 1.5, "top_p": 0.6},
    {"temperature": 1.0, "min_p": 0.2}, {"temperature": 1.0, "top_k": 6, "top_p": 0.8, "min_p": 0.05},
    {"temperature": 0.8, "repetition_penalty": 1.7}, {"temperature": 1.0, "presence_penalty": 1.5},
    {"temperature": 1.0, "frequency_penalty": -0.7}, {"temperature": 1.0, "logit_bias": {3: 2.0, 5: -math.inf}},
    {"temperature": 0.0, "repetition_penalty": 3.0}, {"temperature": 0.0, "frequency_penalty": 2.0},
]  # fmt: skip


@pytest.mark.parametrize("fields", CASES)
def test_the_distribution_is_that_of_the_options(fields: dict[str, Any]) -> None:
    options = RequestOptions(**fields)
    logits = np.random.default_rng(1).normal(size=12).astype(np.float32) * 2
    prompt, draws = [1, 1, 4], 800
    counts, answers = np.zeros(12), set()
    for seed in range(draws):
        sampler = Sampler(options, prompt, seed)
        answer = [sampler.choose(np.eye(12, dtype=np.float32)[token] * 99)[0] for token in (2, 2, 7)]
        answers.add(tuple(answer))
        counts[sampler.choose(logits)[0]] += 1
    assert len(answers) == 1
    expected = restated(logits, prompt, answer, options)
    assert not counts[expected == 0].any()
    error = np.abs(counts / draws - expected)
    assert (error <= 4.5 * np.sqrt(expected * (1 - expected) / draws) + 1e-12).all(), (counts / draws, expected)


@pytest.mark.parametrize("fields", [{}, {"top_p": 0.97}, {"min_p": 1e-5}, {"top_k": 1200}, {"top_k": 4000}])
def test_a_large_vocabulary_is_sampled_as_if_it_were_sorted_whole(fields: dict[str, Any]) -> None:
    """With flat logits what is chosen is often not among the first, with steep ones always."""
    for spread in (0.1, 1.0, 8.0):
        logits = (np.random.default_rng(2).normal(size=2000) * spread).astype(np.float32)
        options = RequestOptions(temperature=1.0, **fields)
        probabilities = restated(logits, [], [], options)
        sums = probabilities.cumsum()
        for seed in range(20):
            number = random.Random(seed).random()
            place = int(np.searchsorted(sums, number * sums[-1], side="right"))
            assert abs(sums - number).min() > 1e-9
            assert Sampler(options, [], seed).choose(logits)[0] == place


def test_equal_logits_and_one_choice_are_the_likeliest() -> None:
    logits = np.array([1.0, 3.0, 3.0, 2.0], dtype=np.float32)
    for fields in ({"temperature": 0.0}, {"temperature": 2.0, "top_k": 1}, {"temperature": 1e-300}):
        assert Sampler(RequestOptions(**fields), [], 5).choose(logits)[0] in ({1, 2} if "top_k" not in fields else {1})


def test_logprobs_are_the_models_own() -> None:
    logits = np.random.default_rng(3).normal(size=50).astype(np.float32) * 5
    token, found = Sampler(RequestOptions(logprobs=4, temperature=2.0, seed=1, top_k=9), [], 1).choose(logits)
    expected = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum())
    assert found is not None and found.token == token and found.logprob == pytest.approx(expected[token], abs=1e-9)
    assert [each for each, _ in found.top] == list(np.argsort(-logits, kind="stable")[:4])
    assert [value for _, value in found.top] == pytest.approx(expected[[each for each, _ in found.top]].tolist())


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_no_numbers(wrong: float) -> None:
    with pytest.raises(BitwrightError, match="BW601"):
        Sampler(RequestOptions(), [], 0).choose(np.array([1.0, wrong, 2.0], dtype=np.float32))
    with pytest.raises(ArgumentError, match=r"BW201.*leaves no token"):
        options = RequestOptions(logit_bias={0: -math.inf, 1: -math.inf})
        Sampler(options, [], 0).choose(np.array([1.0, 1.0], dtype=np.float32))


def test_a_repetition_penalty_makes_less_likely_what_is_unlikely_too() -> None:
    """Negative logits are multiplied by it: divided, they would become likelier."""
    logits = np.array([-1.0, -1.5, -9.0], dtype=np.float32)
    assert Sampler(RequestOptions(repetition_penalty=2.0), [], 0).choose(logits)[0] == 0
    assert Sampler(RequestOptions(repetition_penalty=2.0), [0], 0).choose(logits)[0] == 1
    assert Sampler(RequestOptions(repetition_penalty=1.4), [0], 0).choose(logits)[0] == 0
