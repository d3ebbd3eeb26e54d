"""Perplexity against a restatement, one token at a time in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from bitwright.core.errors import BitwrightError
from bitwright.evaluation.measurement import ModelLogits, measure
from bitwright.evaluation.perplexity import perplexity_of
from bitwright.evaluation.windows import TokenWindows, cut_text


def random_text(tokens: int, seqlen: int, vocabulary: int = 64) -> TokenWindows:
    ids = torch.randint(vocabulary, (tokens,), generator=torch.Generator().manual_seed(tokens))
    return cut_text(ids, seqlen=seqlen, source="random")


def naive_perplexity(model: nn.Module, text: TokenWindows) -> float:
    """Each token from the tokens before it in its window, by itself, in float64 and Python's own sums."""
    total, count = 0.0, 0
    for window in text.windows:
        for place in range(1, len(window)):
            with torch.no_grad():
                logits = model(input_ids=window[None, :place]).logits[0, -1].tolist()
            largest = max(logits)
            total -= logits[int(window[place])] - largest - math.log(sum(math.exp(x - largest) for x in logits))
            count += 1
    return math.exp(total / count)


@pytest.mark.parametrize(("tokens", "seqlen"), [(50, 16), (33, 16), (40, 64), (2, 2), (34, 16)])
def test_perplexity_is_that_of_the_definition(model: LlamaForCausalLM, tokens: int, seqlen: int) -> None:
    text = random_text(tokens, seqlen)
    found, interval = measure(ModelLogits(model, text), text, batch=2).perplexity()
    assert found == pytest.approx(naive_perplexity(model.double(), text), rel=1e-5)
    assert (interval is None) == (len(text.windows) < 2)
    if interval is not None:
        assert interval[0] <= found <= interval[1]


def test_the_batch_does_not_matter(model: LlamaForCausalLM) -> None:
    text = random_text(200, 16)
    results = [measure(ModelLogits(model, text), text, batch=batch) for batch in (1, 2, 5, 100)]
    for other in results[1:]:
        torch.testing.assert_close(other.losses, results[0].losses, rtol=1e-5, atol=0)
        assert torch.equal(other.counts, results[0].counts)


class Scripted(nn.Module):
    """Gives the logits it was told to, at every place."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, input_ids: Tensor, use_cache: bool) -> CausalLMOutput:
        return CausalLMOutput(logits=self.logits.expand(*input_ids.shape, -1))


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    text = random_text(100, 10, vocabulary=7)
    model = Scripted(torch.full((7,), 3.5))
    assert measure(ModelLogits(model, text), text, batch=3).perplexity()[0] == pytest.approx(7, rel=1e-12)


def test_rows_of_a_window_may_be_worked_on_in_parts(model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    text = random_text(100, 20)
    whole = measure(ModelLogits(model, text), text, batch=2, reference=ModelLogits(model, text))
    monkeypatch.setattr("bitwright.evaluation.measurement.CELLS", 64 * 3)
    parts = measure(ModelLogits(model, text), text, batch=2, reference=ModelLogits(model, text))
    assert torch.equal(whole.losses, parts.losses) and whole.divergences is not None and parts.divergences is not None
    assert torch.equal(whole.divergences, parts.divergences)


def test_nan_is_an_error_and_not_a_figure() -> None:
    text = random_text(10, 5, vocabulary=3)
    model = Scripted(torch.tensor([0.0, float("nan"), 1.0]))
    with pytest.raises(BitwrightError, match="BW601") as caught:
        measure(ModelLogits(model, text), text, batch=1)
    assert "4 of 4 tokens" in str(caught.value)


def test_a_token_held_impossible_gives_infinity() -> None:
    text = random_text(10, 5, vocabulary=3)
    model = Scripted(torch.tensor([0.0, -float("inf"), -float("inf")]))
    assert measure(ModelLogits(model, text), text, batch=1).perplexity()[0] == math.inf
    assert perplexity_of(1000.0) == math.inf and perplexity_of(0.0) == 1.0
