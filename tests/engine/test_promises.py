"""What the engine promises under pressure: the same answers with a quarter of the room, and no page lost."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

import pytest
from transformers import PreTrainedModel

from benchmarks.soak import alone, mixed_requests, pages_needed, soak, under_pressure
from bitwright import Engine
from bitwright.engine.drafting import look_up
from bitwright.models.paged_cache import PAGE
from bitwright.quantization.session import quantize_module


def check_books(engine: Engine) -> None:
    engine._loop._allocator.check()
    assert engine.statistics().cache_used == 0 and engine.statistics().running == engine.statistics().waiting == 0


def _count_tokens(engine: Engine) -> list[int]:
    """How many tokens each step computes, from now on."""
    counts: list[int] = []
    decoder = engine._loop._runner.decoder
    forward = decoder.forward

    def counting(step: Any, cache: Any) -> Any:
        counts.append(len(step.tokens))
        return forward(step, cache)

    decoder.forward = counting  # type: ignore[method-assign]
    return counts


def test_as_many_tokens_are_guessed_as_were_right(tiny: PreTrainedModel) -> None:
    """Twice as many while all are right, one after none was."""
    prompt = [5, 6, 7]
    with Engine(tiny, speculate=0) as engine:
        answer = list(engine.generate([prompt], max_tokens=40, ignore_end=True)[0].tokens)
    wanted: list[int] = []

    def know(tokens: Sequence[int], most: int) -> list[int]:
        wanted.append(most)
        return answer[len(tokens) - len(prompt) :][:most]

    def err(tokens: Sequence[int], most: int) -> list[int]:
        wanted.append(most)
        return [(token + 1) % 80 for token in know(tokens, most)]

    for draft, expected in ((know, [1, 2, 4, 6, 6, 6]), (err, [1] * 12)):
        with Engine(tiny, speculate=6) as engine:
            engine._loop._scheduler._draft = draft
            computed = _count_tokens(engine)
            found = engine.generate([prompt], max_tokens=40, ignore_end=True)[0]
        assert list(found.tokens) == answer
        assert wanted[: len(expected)] == expected
        if draft is know:  # nothing is computed twice, and the last token never
            assert sum(computed) == len(prompt) + len(answer) - 1
        wanted.clear()


def _slow_down(engine: Engine) -> None:
    """Steps of a millisecond at least: requests meet, however fast the kernels are."""
    decoder = engine._loop._runner.decoder
    forward = decoder.forward

    def late(step: Any, cache: Any) -> Any:
        time.sleep(0.001)
        return forward(step, cache)

    decoder.forward = late  # type: ignore[method-assign]


@pytest.mark.parametrize(("kind", "count"), [("float32", 24), ("quantized, int4 cache, speculation", 12)])
def test_requests_in_a_quarter_of_the_room(tiny: PreTrainedModel, kind: str, count: int) -> None:
    plain = kind == "float32"
    model: Any = tiny if plain else quantize_module(tiny, scheme="w4g32")
    scheme = {} if plain else {"kv_cache": "int4"}
    requests, cancelled = mixed_requests(count, 3, 80), set(random.Random(4).sample(range(count), count // 5))
    expected = alone(model, requests, **scheme)
    room = pages_needed(requests) // 4 * PAGE
    more: dict[str, Any] = {} if plain else {"speculate": 4}
    with Engine(model, max_batch=64, cache_tokens=room, step_tokens=256, **scheme, **more) as engine:
        _slow_down(engine)
        answers = under_pressure(engine, requests, 5, cancelled)
        statistics = engine.statistics()
        assert statistics.preemptions > 0, "there was no pressure"
        check_books(engine)
    finished = [n for n, answer in enumerate(answers) if answer.finish_reason != "cancelled"]
    assert len(finished) >= count - len(cancelled)
    for number in finished:
        assert answers[number].tokens == expected[number].tokens, f"request {number} has another answer in company"
    for number in set(range(count)) - set(finished):
        tokens = answers[number].tokens
        assert tokens == expected[number].tokens[: len(tokens)]
    assert statistics.finished + statistics.cancelled == count and statistics.failed == 0


def test_the_oldest_is_never_overtaken(tiny: PreTrainedModel) -> None:
    """With room for one and a half, whoever came first ends first."""
    with Engine(tiny, cache_tokens=96, reuse=0) as engine:
        handles = [engine.submit([n + 1] * 30, max_tokens=60) for n in range(4)]
        answers = [handle.result(60) for handle in handles]
    ends = [answer.seconds for answer in answers]
    assert ends == sorted(ends) and answers[0].preemptions == 0


def test_guesses_change_nothing(tiny: PreTrainedModel) -> None:
    """Greedy or by chance, with penalties and stops: answers are the same with speculation, and guesses are right."""
    requests = mixed_requests(12, 8, 80)
    expected = alone(tiny, requests)
    with Engine(tiny, speculate=6) as engine:
        answers = [engine.generate([prompt], **fields)[0] for prompt, fields in requests]
        answers += [handle.result(60) for handle in [engine.submit(prompt, **fields) for prompt, fields in requests]]
        statistics = engine.statistics()
        check_books(engine)
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected * 2]
    assert 0 < statistics.accepted_tokens < statistics.drafted_tokens
    assert statistics.steps < sum(len(answer.tokens) for answer in answers)


@pytest.mark.parametrize(
    ("tokens", "most", "expected"),
    [
        ([1, 2, 3, 9, 1, 2, 3], 2, [9, 1]), ([1, 2, 3, 4, 5], 4, []), ([7, 7, 7, 7], 3, [7]), ([5], 3, []),
        ([1, 2, 8, 1, 2, 9, 1, 2], 1, [9]), ([], 2, []), ([4, 1, 2, 8, 3, 1, 2, 9, 4, 1, 2], 1, [8]),
    ],
)  # fmt: skip
def test_looking_up(tokens: list[int], most: int, expected: list[int]) -> None:
    """The longest ending counts, then the latest place."""
    assert look_up(tokens, most) == expected


@pytest.mark.parametrize("kv", ["none", "int8", "int4"])
def test_equal_beginnings_are_reused(tiny: PreTrainedModel, kv: str) -> None:
    """E37, in units of 128 tokens: of 300 equal ones 256 are found again; after their time is over, none."""
    long = tiny.config.max_position_embeddings
    common = random.Random(1).choices(range(1, 80), k=300)
    try:
        tiny.config.max_position_embeddings = 1024
        with Engine(tiny, reuse=128, kv_cache=kv, reuse_seconds=30) as engine:
            cold = engine.generate([[*common, 5, 6]], max_tokens=8)[0]
            warm = engine.generate([[*common, 5, 6]], max_tokens=8)[0]
            other = engine.generate([[*common, 7]], max_tokens=8)[0]
            assert (cold.reused_tokens, warm.reused_tokens, other.reused_tokens) == (0, 256, 256)
            assert warm.tokens == cold.tokens
            engine._loop._allocator._ttl = 0.0
            late = engine.generate([[*common, 5, 6]], max_tokens=8)[0]
            assert late.reused_tokens == 0 and late.tokens == cold.tokens
            assert engine.statistics().reused_tokens == 512
    finally:
        tiny.config.max_position_embeddings = long


def test_an_answer_is_reused_as_the_beginning_of_a_conversation(tiny: PreTrainedModel) -> None:
    with Engine(tiny) as engine:
        first = engine.generate([[3] * 20], max_tokens=60)[0]
        again = engine.generate([[3] * 20 + list(first.tokens) + [4]], max_tokens=4)[0]
    assert again.reused_tokens == 64
    assert again.tokens == alone(tiny, [([3] * 20 + list(first.tokens) + [4], {"max_tokens": 4})])[0].tokens


@pytest.mark.slow
def test_a_long_run_does_not_grow(tiny: PreTrainedModel) -> None:
    """The soak of ``benchmarks/soak.py``, for 40 seconds."""
    growth = soak(tiny, seconds=40.0, vocabulary=80)
    assert growth.rounds > 3 and growth.answers > 100 and growth.wrong == growth.lost_pages == 0, growth
    assert growth.bytes_per_round < 64 << 10
