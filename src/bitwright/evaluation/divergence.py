"""How far a model's predictions are from a reference's: KL divergence and agreement on the likeliest token."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["agreement", "divergence"]


def divergence(reference: Tensor, model: Tensor) -> Tensor:
    """KL(reference || model) in nats of each position, float64 ``[n]``.

    Args:
        reference: log-probabilities over the whole vocabulary, float64 ``[n, vocabulary]``.
        model: the same of the model that is measured.
    """
    probability = reference.exp()
    # A token of probability zero adds nothing, however unlikely the model holds it to be.
    return torch.where(probability > 0, probability * (reference - model), 0.0).sum(-1)


def agreement(reference: Tensor, model: Tensor) -> Tensor:
    """Whether the likeliest token is the same, bool ``[n]``; of equally likely tokens the first counts."""
    return reference.argmax(-1) == model.argmax(-1)
