"""Choosing without sorting, against choosing with sorting in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.kernels import native_library
from bitwright.kernels.native_sampling import choose

pytestmark = pytest.mark.skipif(native_library.missing() is not None, reason="the native kernels are not built")

SETTINGS = [
    {}, {"temperature": 0.3}, {"temperature": 2.5}, {"top_k": 1}, {"top_k": 40}, {"top_p": 0.9}, {"top_p": 1e-9},
    {"min_p": 0.05}, {"top_k": 50, "top_p": 0.8}, {"top_k": 300, "top_p": 0.95, "min_p": 0.02, "temperature": 0.8},
]  # fmt: skip


def naive_chances(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> Tensor:
    """Float64 chances of all tokens, by sorting."""
    chances = ((logits.double() - logits.double().max()) / temperature).exp()
    order = chances.argsort(descending=True, stable=True)
    kept = chances[order]
    kept[top_k or len(kept) :] = 0
    kept[kept.cumsum(0) - kept >= top_p * kept.sum()] = 0
    kept[kept < min_p * kept[0]] = 0
    found = torch.zeros_like(chances)
    found[order] = kept / kept.sum()
    return found


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("size", [1, 7, 997, 30011])
def test_every_number_stands_for_the_token_of_its_place(isa: str, size: int, settings: dict[str, float]) -> None:
    logits = torch.randn(size) * 3
    ends = naive_chances(logits, **settings).cumsum(0)  # type: ignore[arg-type]
    for uniform in torch.rand(40, dtype=torch.float64).tolist():
        token = choose(logits, uniform=uniform, **settings)  # type: ignore[arg-type]
        begin = float(ends[token - 1]) if token else 0.0
        assert begin - 1e-6 <= uniform < float(ends[token]) + 1e-6, f"seed {torch.initial_seed()}"
        assert float(ends[token]) > begin


def test_equal_logits_are_taken_in_order(isa: str) -> None:
    logits = torch.zeros(100)
    logits[50:] = 1.0
    for uniform in (0.0, 0.49, 0.999):
        assert choose(logits, uniform=uniform, top_k=10) == 50 + int(uniform * 10)
        assert choose(logits, uniform=uniform, top_k=10, top_p=0.5) == 50 + int(uniform * 5)
    assert choose(logits, uniform=0.7, temperature=0) == 50


def test_the_likeliest(isa: str) -> None:
    for size in (1, 15, 16, 17, 5000):
        logits = torch.randn(size)
        for settings in ({"temperature": 0.0}, {"top_k": 1}, {"temperature": 1e-42}):
            assert choose(logits, uniform=0.99, **settings) == int(logits.argmax())  # type: ignore[arg-type]
    banned = torch.full((40,), -torch.inf)
    banned[23] = -1e30
    assert choose(banned, uniform=0.999) == 23


def test_what_is_refused(isa: str) -> None:
    logits = torch.randn(50)
    for settings in (
        {"uniform": 1.0}, {"uniform": -0.1}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1},
        {"top_p": 0.0}, {"top_p": 1.5}, {"min_p": -0.1}, {"min_p": float("nan")},
    ):  # fmt: skip
        with pytest.raises(BitwrightError, match=f"BW201.*{next(iter(settings))}"):
            choose(logits, **{"uniform": 0.5, **settings})  # type: ignore[arg-type]
    for bad in (logits.double(), logits[::2], logits.view(5, 10), logits[:0]):
        with pytest.raises(BitwrightError, match="BW201"):
            choose(bad, uniform=0.5)
    for number in (torch.nan, torch.inf):
        for place in (0, 17, 49):
            broken = logits.clone()
            broken[place] = number
            with pytest.raises(BitwrightError, match="BW601"):
                choose(broken, uniform=0.5)
    with pytest.raises(BitwrightError, match="BW601"):
        choose(torch.full((50,), -torch.inf), uniform=0.5)
