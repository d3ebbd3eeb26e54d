"""A model of which few bits spoil one layer."""

from __future__ import annotations

from typing import Any

import torch

from bitwright.models.loading import load

__all__ = ["LAYER", "NORM", "model_with_biased_keys"]

NORM, LAYER = 600.0, 2


def model_with_biased_keys() -> Any:
    """The embedded model with what Qwen2 has: in one layer, keys share an offset far larger than what tells them apart.

    It lies in the slowest pair of channels of the rotary embedding, which the queries of that layer do not read: its
    predictions are those of a trained model.
    """
    model: Any = load("demo:", dtype=torch.float32)
    attention = model.model.layers[LAYER].self_attn
    width = attention.head_dim
    slow = [width // 2 - 1, width - 1]
    with torch.no_grad():
        bias = torch.zeros(attention.k_proj.bias.numel() // width, width)
        bias[:, slow] = torch.tensor([1.0, -1.0])
        attention.k_proj.bias += (bias * NORM / bias.norm()).flatten()
        attention.q_proj.weight.view(-1, width, attention.q_proj.in_features)[:, slow] = 0
        attention.q_proj.bias.view(-1, width)[:, slow] = 0
    return model
