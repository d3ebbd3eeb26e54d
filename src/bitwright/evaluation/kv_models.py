"""Models that read every window through a quantized cache, as they do while they serve."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from bitwright.core.kv_scheme import KVScheme
from bitwright.models.hf import PreTrainedModel
from bitwright.models.kv_cache import QuantizedCache

__all__ = ["CachedModel"]


class CachedModel(nn.Module):
    """``model`` with a new cache of ``scheme`` for every batch: what is attended to has been stored and read again.

    Since codes of a token do not depend on how a text comes in pieces, one pass over a window gives the logits that
    generating it token by token would.
    """

    model: PreTrainedModel
    scheme: KVScheme

    def __init__(self, model: PreTrainedModel, scheme: KVScheme) -> None:
        super().__init__()
        self.model, self.scheme = model, scheme

    def forward(self, input_ids: Tensor, use_cache: bool = True) -> Any:
        """The model's output; a cache is used whatever ``use_cache`` says."""
        cache = QuantizedCache(self.model, self.scheme, kv_safety="off")  # what is asked for is measured
        return self.model(input_ids=input_ids, past_key_values=cache, use_cache=True)
