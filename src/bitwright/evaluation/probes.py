"""The embedded questions: does the model, greedily, give each right answer?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitwright.models.embedded_model import Probe

__all__ = ["EncodedProbe", "encode_probes", "first_of_each_kind", "probe_counts", "right_answers"]

BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class EncodedProbe:
    """A probe as tokens: ``tokens`` is the prompt and its answer (int64), the answer the last ``answer`` of them."""

    kind: str
    tokens: Tensor
    answer: int


def first_of_each_kind(probes: Iterable[Probe], count: int) -> tuple[Probe, ...]:
    """The first ``count`` probes of each kind, in their order."""
    seen: dict[str, int] = {}
    chosen = []
    for probe in probes:
        seen[probe.kind] = seen.get(probe.kind, 0) + 1
        if seen[probe.kind] <= count:
            chosen.append(probe)
    return tuple(chosen)


def encode_probes(probes: Iterable[Probe], tokenize: Callable[[str], Tensor]) -> tuple[EncodedProbe, ...]:
    """Tokenize prompts and answers, each by itself, as generation does.

    Args:
        tokenize: from a text to its token ids (int64 ``[n]``).
    """
    encoded = []
    for probe in probes:
        prompt, answer = tokenize(probe.prompt), tokenize(probe.answer)
        encoded.append(EncodedProbe(probe.kind, torch.cat([prompt, answer]), len(answer)))
    return tuple(encoded)


def probe_counts(probes: Iterable[EncodedProbe]) -> dict[str, int]:
    """How many probes there are of each kind."""
    counts: dict[str, int] = {}
    for probe in probes:
        counts[probe.kind] = counts.get(probe.kind, 0) + 1
    return counts


def right_answers(model: nn.Module, probes: Sequence[EncodedProbe]) -> dict[str, int]:
    """How many probes of each kind the model answers right: every token of the answer is the likeliest one.

    One pass with the answer in place is the same as generating greedily: up to the first wrong token both read the
    same text. Shorter probes are filled up on the right, where causal attention does not look.
    """
    right = dict.fromkeys(probe_counts(probes), 0)
    ordered = sorted(probes, key=lambda probe: len(probe.tokens))
    start = 0
    while start < len(ordered):
        end = start + 1
        while end < len(ordered) and (end + 1 - start) * len(ordered[end].tokens) <= BATCH_TOKENS:
            end += 1
        for probe, is_right in zip(ordered[start:end], _answer(model, ordered[start:end]), strict=True):
            right[probe.kind] += is_right
        start = end
    return right


def _answer(model: nn.Module, probes: Sequence[EncodedProbe]) -> list[bool]:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    padded = torch.nn.utils.rnn.pad_sequence([probe.tokens for probe in probes], batch_first=True).to(device)
    with torch.inference_mode():
        likeliest = model(input_ids=padded, use_cache=False).logits.argmax(-1)
    results = []
    for row, probe in enumerate(probes):
        end = len(probe.tokens)
        answer = slice(end - probe.answer, end)
        found = likeliest[row, answer.start - 1 : answer.stop - 1]
        results.append(bool(torch.equal(found, padded[row, answer])))
    return results
