"""What a request leaves in its pages when it is called off: the next one who has them meets nothing of it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from bitwright import Engine
from bitwright.core.errors import BitwrightError
from bitwright.engine.scheduler import Work
from bitwright.kernels import native_library
from bitwright.quantization.session import quantize_module
from tests.models.architectures import build

BROKEN = 77


def broken_model(scheme: str | None = None) -> PreTrainedModel:
    """With a token whose embedding is NaN."""
    model: Any = build("llama", num_hidden_layers=1, eos_token_id=None)
    if scheme is not None:
        model = quantize_module(model, scheme=scheme)
    model.get_input_embeddings().weight.data[BROKEN] = math.nan
    broken: PreTrainedModel = model
    return broken


@pytest.mark.parametrize("decoder", ["torch", "native"])
def test_numbers_that_are_not_finite_end_with_their_request(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token whose embedding is NaN, in a long prompt that is called off before anybody has seen its logits."""
    if decoder == "native" and native_library.missing() is not None:
        pytest.skip("the native kernels are not built here")
    with Engine(broken_model(), decoder=decoder, cache_tokens=128, step_tokens=32, reuse=0) as engine:
        expected = engine.generate([[9] * 40], max_tokens=20)[0].tokens
        run = engine._loop._runner.run

        def run_and_cancel(works: Sequence[Work]) -> list[NDArray[np.float32]]:
            for work in works:
                work.request.is_cancelled = BROKEN in work.request.tokens
            return run(works)

        monkeypatch.setattr(engine._loop._runner, "run", run_and_cancel)
        assert engine.generate([[BROKEN] * 100], max_tokens=20)[0].finish_reason == "cancelled"
        cache = engine._loop._runner.cache
        assert any(bool(torch.isnan(pages).any()) for pages in (*cache.keys, *cache.values)), "nothing was left"
        for length in (40, 41, 63):
            engine.generate([[9] * length], max_tokens=20)
        assert engine.generate([[9] * 40], max_tokens=20)[0].tokens == expected


@pytest.mark.parametrize("decoder", ["torch", "native"])
@pytest.mark.parametrize(("scheme", "kv_cache"), [(None, "none"), (None, "int8"), ("w8a8", "none")])
def test_a_request_whose_numbers_are_not_finite_fails_alone(decoder: str, scheme: str | None, kv_cache: str) -> None:
    """Also where a decoder cannot round them, and so cannot end the step that they share with others."""
    if decoder == "native" and native_library.missing() is not None:
        pytest.skip("the native kernels are not built here")
    prompts = [[9] * 40, [BROKEN] * 40, [8, 7], [9] * 20 + [BROKEN]]
    with Engine(broken_model(scheme), decoder=decoder, kv_cache=kv_cache) as engine:
        alone = [engine.generate([prompt], max_tokens=20)[0].tokens for prompt in (prompts[0], prompts[2])]
        handles = [engine.submit(prompt, max_tokens=20) for prompt in prompts]
        assert [handles[number].result(30).tokens for number in (0, 2)] == alone
        for number in (1, 3):
            with pytest.raises(BitwrightError, match=r"BW60[12]"):
                handles[number].result(30)
        assert engine.generate([prompts[0]], max_tokens=20)[0].tokens == alone[0]
        assert engine.statistics().failed == 2 and engine.statistics().cache_used == 0
        engine._loop._allocator.check()
