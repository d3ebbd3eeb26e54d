"""The engine on the native decoder: the same promises, on a trained model, in more requests."""

from __future__ import annotations

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from benchmarks.soak import alone, mixed_requests, pages_needed, soak, under_pressure
from bitwright import Engine
from bitwright.core.errors import ArgumentError, Notice
from bitwright.engine.options import RequestOptions
from bitwright.engine.sampler import Sampler
from bitwright.kernels import native_library
from bitwright.models.loading import load
from bitwright.models.paged_cache import PAGE
from bitwright.quantization.session import quantize_module

KINDS: list[tuple[str, dict[str, Any], str | None]] = [
    ("bfloat16", {}, None),
    ("8-bit cache, speculation", {"kv_cache": "int8", "speculate": 5}, None),
    ("quantized, rotated 4-bit cache", {"kv_cache": "int4-rotated"}, "w4g64"),
    ("8-bit activations, one token at a time", {"step_tokens": 7}, "w8a8"),
    ("8-bit activations in groups", {}, "w4g32-a8g32"),
]


@pytest.fixture(autouse=True)
def _built() -> None:
    missing = native_library.missing()
    if missing is not None:
        pytest.skip(missing)


@pytest.mark.parametrize(("kind", "fields", "scheme"), KINDS, ids=[kind for kind, _, _ in KINDS])
def test_requests_in_a_quarter_of_the_room(kind: str, fields: dict[str, Any], scheme: str | None) -> None:
    count = 64 if kind == "bfloat16" else 24
    model: Any = load("demo:")
    if scheme is not None:
        model = quantize_module(model, scheme=scheme)
    requests, cancelled = mixed_requests(count, 3, 2048, 70), set(random.Random(4).sample(range(count), count // 5))
    expected = alone(model, requests, **{name: value for name, value in fields.items() if name == "kv_cache"})
    room = pages_needed(requests) // 4 * PAGE
    with Engine(model, **{"max_batch": 64, "cache_tokens": room, "step_tokens": 256} | fields) as engine:
        answers = under_pressure(engine, requests, 5, cancelled)
        statistics = engine.statistics()
        engine._loop._allocator.check()
    assert statistics.decoder == "native" and statistics.cache_used == statistics.failed == 0
    assert statistics.preemptions > 0 or fields.get("step_tokens") == 7  # which no more than seven share
    for number, (answer, alike) in enumerate(zip(answers, expected, strict=True)):
        if answer.finish_reason == "cancelled":
            assert number in cancelled and answer.tokens == alike.tokens[: len(answer.tokens)]
        else:
            assert answer.tokens == alike.tokens, f"request {number} has another answer in company"


def test_both_decoders_give_the_same_greedy_text(shared_models: Path) -> None:
    """In float32, where near ties are rare: 200 tokens of a trained model."""
    model = load(shared_models / "wikitext-qwen2-6m", dtype=torch.float32)
    answers = {}
    for name in ("native", "torch"):
        with Engine(model, decoder=name) as engine:
            answers[name] = [answer.tokens for answer in engine.generate(["The war", "In 1066"], max_tokens=100)]
            assert engine.statistics().decoder == name
    assert answers["native"] == answers["torch"]


@pytest.mark.parametrize("fields", [{}, {"top_k": 40}, {"top_p": 0.9}, {"min_p": 0.02}, {"top_k": 300, "top_p": 0.8}])
def test_a_seed_is_the_same_token_natively(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """On logits of several steepnesses, in a vocabulary of 5000."""
    options = RequestOptions(temperature=0.9, **fields)
    cases = [
        ((np.random.default_rng(seed).normal(size=5000) * spread).astype(np.float32), seed)
        for seed in range(10)
        for spread in (0.3, 3.0)
    ]
    native = [Sampler(options, [], seed).choose(logits)[0] for logits, seed in cases]
    monkeypatch.setattr(native_library, "_MISSING", "left aside")
    assert native == [Sampler(options, [], seed).choose(logits)[0] for logits, seed in cases]


@pytest.mark.parametrize(
    ("fields", "accepted"),
    [
        ({"temperature": 1e39}, {0, 1, 2, 3}), ({"temperature": 1e300, "top_k": 1 << 40}, {0, 1, 2, 3}),
        ({"temperature": 1e-300}, {1}), ({"temperature": 5e-324}, {1}), ({"temperature": 1.0, "top_p": 1e-50}, {1}),
        ({"temperature": 0.1, "min_p": 1e-300, "top_p": 5e-324}, {1}), ({"repetition_penalty": 1e-300}, {0}),
        ({"repetition_penalty": 1e300}, {1}), ({"temperature": 1.0, "repetition_penalty": 1e-50}, {0}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("is_native", [True, False])
def test_numbers_that_float32_cannot_hold_mean_what_they_say(
    fields: dict[str, Any], accepted: set[int], is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All tokens are as likely at a huge temperature, and a share of the chance that is next to none leaves one."""
    if not is_native:
        monkeypatch.setattr(native_library, "_MISSING", "left aside")
    logits = np.array([0.5, 2.0, -1.0, 0.0], dtype=np.float32)
    found = {Sampler(RequestOptions(**fields), [0, 2], seed).choose(logits)[0] for seed in range(60)}
    assert found == accepted


def test_options_at_their_ends_fail_nobody() -> None:
    ends = ({"temperature": 1e300}, {"temperature": 1.0, "top_p": 1e-300}, {"temperature": 1.0, "top_k": 1 << 70})
    for fields in (*ends, {"repetition_penalty": 1e300}, {"repetition_penalty": 1e-300, "temperature": 1.0}):
        with Engine("demo:") as engine:
            options: dict[str, Any] = {"max_tokens": 3, "ignore_end": True, "seed": 1, **fields}
            assert len(engine.generate("Once", **options).tokens) == 3


def test_an_output_head_in_8_bits() -> None:
    with Engine("demo:", head="w8") as engine, Engine("demo:") as plain:
        assert engine.statistics().weight_bytes < plain.statistics().weight_bytes
        assert len(engine.generate("Once upon a time", max_tokens=20, ignore_end=True).tokens) == 20
    with pytest.raises(ArgumentError, match=r"BW201.*head"):
        Engine("demo:", decoder="torch", head="w8")


def test_who_runs_the_model_is_told(tiny: PreTrainedModel) -> None:
    with (
        pytest.warns(Notice, match="native decoder does not run this model.*fp8"),
        Engine(tiny, kv_cache="fp8") as engine,
    ):
        assert engine.decoder == "torch"
    with warnings.catch_warnings(), Engine(tiny, kv_cache="int8") as engine:
        assert engine.decoder == "native"
    with pytest.raises(ArgumentError, match=r"BW201.*kv_cache 'fp8'"):
        Engine(tiny, kv_cache="fp8", decoder="native")


def test_a_run_does_not_grow() -> None:
    """The soak of ``benchmarks/soak.py``, for a few seconds."""
    growth = soak(load("demo:"), seconds=3.0, vocabulary=2048, count=12, longest=40)
    assert growth.rounds > 2 and growth.answers > 20 and growth.wrong == growth.lost_pages == 0, growth


@pytest.mark.parametrize("name", ["engine.md", "compat_dashinfer.md"])
def test_the_first_example_of_the_document_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / name).read_text(encoding="utf-8")
    exec(compile(text.split("```python\n")[1].split("```")[0], name, "exec"), {})
    assert capsys.readouterr().out.strip()
