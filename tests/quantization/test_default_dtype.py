"""torch's default dtype is the user's; what is computed here does not depend on it."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

import bitwright
from bitwright.models.quantized import QuantizedLinear

SAMPLES = [torch.randn(1, 40, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]


class Stack(nn.Module):
    """Two blocks that make nothing in torch's default dtype themselves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)) for _ in range(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def codes(model: nn.Module, algorithm: str, options: Mapping[str, object]) -> list[Tensor]:
    prepared = bitwright.prepare(model, scheme="w3g16-asym", algorithm=algorithm, options=options)
    for sample in SAMPLES:
        prepared(sample)
    made = bitwright.convert(prepared)
    return [layer.unpack().codes for layer in made.modules() if isinstance(layer, QuantizedLinear)]


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [
        ("rtn", {}),
        ("hqq", {}),
        ("gptq", {}),
        ("gptq", {"act_order": True}),
        ("awq", {}),
        ("teq", {"steps": 3}),
        ("autoround", {"iters": 3}),
        ("gptq+learned", {"code_steps": 3, "scale_steps": 3}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_codes_are_those_of_the_usual_default(algorithm: str, options: dict[str, object], dtype: torch.dtype) -> None:
    model, kept = Stack(), torch.get_default_dtype()
    expected = codes(model, algorithm, options)
    try:
        torch.set_default_dtype(dtype)
        found = codes(model, algorithm, options)
    finally:
        torch.set_default_dtype(kept)
    assert len(expected) == 4
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
