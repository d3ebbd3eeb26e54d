"""Hours in minutes: rounds of mixed requests under a cache that is too small, with cancellations, on one engine.

In each round 64 requests of mixed lengths come from four threads at mixed times, some of them are called off, and the
cache holds a quarter of what they need. Every answer that ends must be the one that the request gets alone, no page may
be lost, and memory must not grow from round to round.

    python -m benchmarks.soak --seconds 480
"""

from __future__ import annotations

import argparse
import random
import statistics
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bitwright import Engine
from bitwright.engine.handle import Completion, RequestHandle
from bitwright.models.loading import load
from bitwright.models.paged_cache import PAGE

__all__ = ["Ask", "Growth", "alone", "mixed_requests", "pages_needed", "soak", "under_pressure"]

Ask = tuple[list[int], dict[str, Any]]
LEAST_ROUNDS = 3  # however slow the machine is: fewer show no growth


@dataclass(frozen=True, kw_only=True)
class Growth:
    """What a soak found: ``wrong`` answers, ``lost_pages``, and the slope of resident memory after the first third."""

    rounds: int
    answers: int
    wrong: int
    lost_pages: int
    preemptions: int
    bytes_per_round: float


def mixed_requests(count: int, seed: int, vocabulary: int, longest: int = 60) -> list[Ask]:
    """Prompts of 1 to 48 tokens, some with equal beginnings; answers of 1 to ``longest``, most of them greedy."""
    chance = random.Random(seed)
    common = chance.choices(range(1, vocabulary), k=40)
    requests: list[Ask] = []
    for number in range(count):
        own = chance.choices(range(1, vocabulary), k=chance.randint(1, 28))
        prompt = common[: chance.randint(1, 40)] + own[:8] if number % 4 == 0 else own
        fields: dict[str, Any] = {"max_tokens": chance.choice((1, 9, 2 * longest // 3, longest)), "ignore_end": True}
        if number % 5 == 0:
            fields |= {"temperature": 0.9, "seed": number, "top_k": 20, "frequency_penalty": 0.3}
        requests.append((prompt, fields))
    return requests


def alone(model: PreTrainedModel, requests: list[Ask], **engine: Any) -> list[Completion]:
    """Each request by itself in an engine with room for everything, which reuses nothing."""
    with Engine(model, max_batch=1, cache_tokens=4096, reuse=0, **engine) as single:
        return [single.generate([prompt], **fields)[0] for prompt, fields in requests]


def pages_needed(requests: list[Ask]) -> int:
    return sum(-(-(len(prompt) + fields["max_tokens"]) // PAGE) for prompt, fields in requests)


def under_pressure(engine: Engine, requests: list[Ask], seed: int, cancelled: set[int]) -> list[Completion]:
    """All requests at mixed times from four threads, some of them called off while they run."""
    handles: dict[int, RequestHandle] = {}

    def client(numbers: list[int]) -> None:
        chance = random.Random(seed + numbers[0])
        for number in numbers:
            prompt, fields = requests[number]
            handles[number] = engine.submit(prompt, **fields)
            if chance.random() < 0.5:
                time.sleep(chance.random() * 0.002)
            if number in cancelled and chance.random() < 0.7:
                handles[number].next(0.05)
            if number in cancelled:
                handles[number].cancel()

    threads = [threading.Thread(target=client, args=(list(range(n, len(requests), 4)),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [handles[number].result(300) for number in range(len(requests))]


def soak(model: PreTrainedModel, *, seconds: float, vocabulary: int, count: int = 64, longest: int = 60) -> Growth:
    """Rounds for so many seconds."""
    requests = mixed_requests(count, 3, vocabulary, longest)
    expected = alone(model, requests)
    room = pages_needed(requests) // 4 * PAGE
    resident: list[int] = []
    wrong = lost = answered = 0
    with Engine(model, max_batch=count, cache_tokens=room, step_tokens=256) as engine:
        end = time.monotonic() + seconds
        while time.monotonic() < end or len(resident) < LEAST_ROUNDS:
            cancelled = set(random.Random(len(resident)).sample(range(count), count // 5))
            answers = under_pressure(engine, requests, len(resident), cancelled)
            for answer, alike in zip(answers, expected, strict=True):
                is_whole = answer.finish_reason != "cancelled"
                wrong += answer.tokens != (alike.tokens if is_whole else alike.tokens[: len(answer.tokens)])
                answered += is_whole
            lost = max(lost, engine.statistics().cache_used)
            resident.append(_resident())
        preemptions = engine.statistics().preemptions
    steady = resident[len(resident) // 3 :]
    slope = statistics.linear_regression(range(len(steady)), steady).slope if len(steady) > 1 else 0.0
    return Growth(
        rounds=len(resident), answers=answered, wrong=wrong, lost_pages=lost, preemptions=preemptions,
        bytes_per_round=slope,
    )  # fmt: skip


def _resident() -> int:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=480.0)
    parser.add_argument("--model", default="demo:")
    arguments = parser.parse_args()
    model = load(arguments.model)
    print(soak(model, seconds=arguments.seconds, vocabulary=model.config.vocab_size, longest=160))


if __name__ == "__main__":
    main()
