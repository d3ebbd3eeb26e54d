"""Probes: right is what greedy generation would answer; batching and padding change nothing."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM
from transformers.modeling_outputs import CausalLMOutput

from bitwright.evaluation.probes import EncodedProbe, encode_probes, first_of_each_kind, probe_counts, right_answers
from bitwright.models.embedded_model import Probe, read_probes


class Counting(nn.Module):
    """After token n it says n + 1."""

    def forward(self, input_ids: Tensor, use_cache: bool) -> CausalLMOutput:
        return CausalLMOutput(logits=nn.functional.one_hot(input_ids + 1, 100).float())


def encoded(kind: str, prompt: list[int], answer: list[int]) -> EncodedProbe:
    return EncodedProbe(kind, torch.tensor(prompt + answer), len(answer))


def test_every_token_of_the_answer_must_be_the_likeliest() -> None:
    probes = [
        encoded("a", [5], [6, 7, 8]),
        encoded("a", [5, 9], [6]),
        encoded("a", [1, 2, 3], [4, 5, 7]),
        encoded("b", [3, 3, 3, 3, 3], [4]),
        encoded("b", [1], [3, 4, 5]),
        encoded("c", [7], [7]),
    ]
    assert right_answers(Counting(), probes) == {"a": 1, "b": 1, "c": 0}
    assert probe_counts(probes) == {"a": 3, "b": 2, "c": 1}


@pytest.mark.parametrize("limit", [1, 40, 4096])
def test_right_is_what_greedy_generation_answers(
    model: LlamaForCausalLM, limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitwright.evaluation.probes.BATCH_TOKENS", limit)
    generator = torch.Generator().manual_seed(0)
    probes, wanted = [], {"true": 0, "changed": 0}
    for number in range(24):
        length = int(torch.randint(1, 12, (1,), generator=generator))
        prompt = torch.randint(64, (length,), generator=generator).tolist()
        tokens = list(prompt)
        for _ in range(3):
            with torch.no_grad():
                tokens.append(int(model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax()))
        answer = tokens[length:]
        kind = "true" if number % 2 else "changed"
        if kind == "changed":
            answer[number % 3] = (answer[number % 3] + 1) % 64
        wanted[kind] += kind == "true"
        probes.append(encoded(kind, prompt, answer))
    assert right_answers(model, probes) == wanted


def test_prompts_and_answers_are_tokenized_by_themselves() -> None:
    seen: list[str] = []

    def tokenize(text: str) -> Tensor:
        seen.append(text)
        return torch.arange(len(text))

    (probe,) = encode_probes([Probe("qa", "Who?", " Me")], tokenize)
    assert seen == ["Who?", " Me"] and probe.answer == 3 and len(probe.tokens) == 7


def test_the_first_of_each_kind() -> None:
    probes = read_probes()
    chosen = first_of_each_kind(probes, 3)
    kinds = {probe.kind for probe in probes}
    assert len(chosen) == 3 * len(kinds) and {probe.kind for probe in chosen} == kinds
    for kind in kinds:
        assert [p for p in chosen if p.kind == kind] == [p for p in probes if p.kind == kind][:3]
