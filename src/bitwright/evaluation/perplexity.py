"""How surprised a model is by a text: the mean negative log-likelihood of its tokens, and e to that power."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bitwright.core.errors import BitwrightError

__all__ = ["log_probabilities", "perplexity_of", "read_windows", "token_losses"]


def read_windows(model: nn.Module, windows: Sequence[Tensor]) -> Tensor:
    """The logits with which ``model`` predicts every token but the first of each window.

    Args:
        model: a causal language model that takes ``input_ids`` and returns ``logits``.
        windows: int64 ``[length]`` each, equally long.

    Returns:
        ``[windows, length - 1, vocabulary]`` in the model's dtype; position ``t`` predicts token ``t + 1``.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        logits: Tensor = model(input_ids=torch.stack(list(windows)).to(device), use_cache=False).logits
    return logits[:, :-1]


def log_probabilities(logits: Tensor) -> Tensor:
    """Logarithms of the probabilities over the whole vocabulary, float64 whatever the logits are.

    At eight bits the divergence of two models is about 1e-5 nats, which float32 sums over a vocabulary cannot hold.
    """
    return torch.log_softmax(logits.to(torch.float64), dim=-1)


def token_losses(log_probability: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihoods in nats, float64 ``[n]``, of ``targets`` ``[n]`` under ``[n, vocabulary]``.

    Raises:
        BitwrightError: BW601 if the model gave NaN.
    """
    losses = -log_probability.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    if bool(torch.isnan(losses).any()):
        count = int(torch.isnan(losses).sum())
        what = f"the model gave NaN for {count} of {len(losses)} tokens of a window"
        raise BitwrightError("BW601", what, suggestion="check the weights with 'bitwright inspect'; quantize again")
    return losses


def perplexity_of(mean_loss: float) -> float:
    """``e ** mean_loss``; infinity where that is beyond float64."""
    return math.exp(mean_loss) if mean_loss < 709 else math.inf
