"""Memory that runs out in the middle of steps: the answers stay the same, or a clear error reaches everybody."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.soak import alone, mixed_requests
from bitwright import Engine
from bitwright.core.errors import BitwrightError
from bitwright.engine.pressure import CALM_STEPS
from bitwright.models.decoder import Step
from bitwright.models.paged_cache import PAGE
from tests.engine.test_promises import check_books


class ShortOfMemory:
    """A decoder whose memory runs out in the steps that ``fails`` names, before or after it wrote to the cache."""

    def __init__(self, engine: Engine, fails: Callable[[int, Step], bool]) -> None:
        runner = engine._loop._runner
        self.real, self.fails, self.steps, self.failures, self.freed = runner.decoder, fails, 0, 0, 0
        self.sizes: list[tuple[int, int]] = []  # requests and tokens of each step that went well
        runner.decoder = self

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def free_memory(self) -> None:
        self.freed += 1

    def forward(self, step: Step, cache: Any) -> Tensor:
        self.steps += 1
        if self.fails(self.steps, step):
            self.failures += 1
            if self.failures % 2:
                self.real.forward(step, cache)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.\nmore")
        self.sizes.append((len(step.lengths), len(step.tokens)))
        return self.real.forward(step, cache)


def _can_be_smaller(step: Step) -> bool:
    """The smallest steps fit: where they do not, too, the engine has nothing left but an error."""
    return len(step.lengths) > 1 or len(step.tokens) > PAGE


@pytest.mark.parametrize("speculate", [0, 4])
def test_answers_are_those_of_undisturbed_runs(tiny: PreTrainedModel, speculate: int) -> None:
    requests = mixed_requests(16, 5, 80)
    expected = alone(tiny, requests)
    all_wait = threading.Event()  # no step ends before, however fast the kernels are
    with Engine(tiny, max_batch=16, step_tokens=128, speculate=speculate) as engine:
        decoder = ShortOfMemory(engine, lambda n, step: all_wait.wait(60) and n % 7 == 3 and _can_be_smaller(step))
        handles = [engine.submit(prompt, **fields) for prompt, fields in requests]
        all_wait.set()
        answers = [handle.result(60) for handle in handles]
        statistics = engine.statistics()
        check_books(engine)
    assert decoder.failures > 2 and statistics.preemptions > 0 and statistics.failed == 0
    assert decoder.freed == decoder.failures
    assert [answer.tokens for answer in answers] == [answer.tokens for answer in expected]


def test_the_newest_wait_and_steps_grow_again(tiny: PreTrainedModel) -> None:
    """Steps of more than two requests never fit at first; later they do."""
    all_wait = threading.Event()
    with Engine(tiny, max_batch=8) as engine:
        decoder = ShortOfMemory(engine, lambda n, step: all_wait.wait(60) and n < 20 and len(step.lengths) > 2)
        handles = [engine.submit([n + 1] * 8, max_tokens=110, ignore_end=True) for n in range(8)]
        all_wait.set()
        answers = [handle.result(60) for handle in handles]
    # A step may begin before all requests are there: then the newest have never run, and others wait; at most 8 to 4 to
    # 2, and a smaller step before.
    assert answers[0].preemptions == 0 and max(answer.preemptions for answer in answers) > 0
    assert decoder.failures <= 4
    assert max(size for size, _ in decoder.sizes[:CALM_STEPS]) == 2
    assert max(size for size, _ in decoder.sizes) > 4, "the limits have grown back"


def test_long_prompts_are_cut_smaller(tiny: PreTrainedModel) -> None:
    prompt = [n % 70 + 1 for n in range(90)]
    with Engine(tiny, reuse=0) as engine:
        expected = engine.generate([prompt], max_tokens=5)[0].tokens
        decoder = ShortOfMemory(engine, lambda _, step: len(step.tokens) > PAGE)
        found = engine.generate([prompt], max_tokens=5)[0]
    assert found.tokens == expected and decoder.failures == 2, "90 tokens, 45, then pages of 32"
    assert found.preemptions == 0


def test_what_never_fits_is_told_with_sizes_and_what_to_do(tiny: PreTrainedModel) -> None:
    all_wait = threading.Event()  # the engine ends with the first error, and then takes no request more
    with Engine(tiny, max_batch=8, speculate=4) as engine:
        decoder = ShortOfMemory(engine, lambda *_: all_wait.wait(60))
        handles = [engine.submit([1, 2, 3] * 30, max_tokens=9) for _ in range(8)]
        all_wait.set()
        errors = []
        for handle in handles:
            with pytest.raises(BitwrightError) as caught:
                handle.result(60)
            errors.append(caught.value)
        with pytest.raises(BitwrightError, match="memory ran out"):
            engine.submit([1])
    assert {error.code for error in errors} == {"BW503"} and decoder.failures <= 8
    what = errors[0].what
    assert "weights take 0.00 GB" in what and f"a step of {PAGE} tokens of one request" in what
    assert errors[0].why == "CUDA out of memory. Tried to allocate 1.00 GiB."
    assert "cache_memory" in (errors[0].suggestion or "")
