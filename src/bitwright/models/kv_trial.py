"""The check of :mod:`.kv_safety` on models of transformers: each is run once a scheme, and the verdict remembered."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from bitwright.core.errors import Notice
from bitwright.core.kv_scheme import KVScheme
from bitwright.models.coded_tokenizers import has_vocabulary
from bitwright.models.empty_cache import EmptyCache
from bitwright.models.hf import PreTrainedModel, Tokenizer, context_length, load_tokenizer
from bitwright.models.kv_safety import (
    KVSafety,
    check_safety,
    has_few_bits,
    judge,
    sample_tokens,
    settle,
)
from bitwright.models.kv_storage import Side

__all__ = ["observe_model", "safe_scheme"]

# By model: the schemes that were judged. Keys and values, of a 7B model 96 MiB, are not kept for the next scheme.
KNOWN: WeakKeyDictionary[PreTrainedModel, dict[str, KVSafety]] = WeakKeyDictionary()


class _Recorder(EmptyCache):
    """Stands in for a cache of an empty context: keeps keys and values as they come, and gives them back."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, tuple[Tensor, Tensor]] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.seen[layer_idx] = (key_states, value_states)
        return key_states, value_states


def safe_scheme(
    model: PreTrainedModel, scheme: KVScheme, safety: str = "warn", *, tokenizer: Tokenizer | None = None
) -> KVScheme:
    """``scheme``, or with ``widen`` one of more bits in the layers where few are unsafe.

    Schemes of more than 4 bits are taken as they are. Unsafe layers are named in a notice, once a model and scheme. A
    model with parameters on the meta device is not tried, which a notice tells as often.

    Raises:
        ArgumentError: BW201 if ``safety`` is none of ``warn``, ``widen``, ``off``.
    """
    check_safety(safety)
    if safety == "off" or not has_few_bits(scheme):
        return scheme
    judged = KNOWN.setdefault(model, {})
    absent = next((name for name, part in model.named_parameters() if part.is_meta), None)
    if absent is not None:
        if scheme.name not in judged:
            judged[scheme.name] = KVSafety(scheme, (), scheme)
            what = f"whether {scheme.name} is safe for this model was not tried: {absent} is on the meta device"
            advice = (
                "bitwright calibrate MODEL --check tries it where the weights are in memory; kv_safety='off' is silent"
            )
            warnings.warn(Notice(f"{what} (offloaded, or not loaded yet); {advice}"), stacklevel=3)
        return scheme
    if scheme.name not in judged:
        judged[scheme.name] = judge(observe_model(model, _text(model, tokenizer)), scheme)
        return settle(judged[scheme.name], safety)
    return judged[scheme.name].recommended if safety == "widen" else scheme


def observe_model(model: PreTrainedModel, tokens: Sequence[int]) -> dict[Side, list[Tensor]]:
    """Keys (after the rotary embedding) and values of each layer: float32 ``[kv_heads, tokens, head_dim]``."""
    recorder = _Recorder()
    inputs = torch.tensor([list(tokens)], device=model.device)
    with torch.no_grad():
        model(input_ids=inputs, past_key_values=recorder, use_cache=True)
    layers = [recorder.seen[number] for number in sorted(recorder.seen)]
    keys, values = ([part[0].to("cpu", torch.float32) for part in parts] for parts in zip(*layers, strict=True))
    return {"key": keys, "value": values}


def _text(model: PreTrainedModel, tokenizer: Tokenizer | None) -> list[int]:
    if tokenizer is None and model.name_or_path and has_vocabulary(Path(model.name_or_path)):
        tokenizer = load_tokenizer(Path(model.name_or_path))
    weight: Any = model.get_input_embeddings().weight
    return sample_tokens(len(weight), context_length(model.config), tokenizer)
