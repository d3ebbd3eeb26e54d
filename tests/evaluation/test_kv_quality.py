"""What cache schemes cost on a trained model, against the bars that they must hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from bitwright.core.kv_codes import rotate_head
from bitwright.evaluation.divergence import agreement, divergence
from bitwright.evaluation.perplexity import log_probabilities
from bitwright.models.hf import load_tokenizer
from bitwright.models.kv_cache import QuantizedCache
from bitwright.models.loading import load

WINDOWS, LENGTH = 10, 512


class BlocksOf32(DynamicCache):
    """The four-bit cache of llama.cpp, restated: rotated, in blocks of 32 with a float16 scale, codes of 4 bits."""

    def update(self, key_states: Tensor, value_states: Tensor, *arguments: Any, **keywords: Any) -> Any:
        return super().update(q4_0(key_states), q4_0(value_states), *arguments, **keywords)


def q4_0(x: Tensor) -> Tensor:
    blocks = rotate_head(x.float()).reshape(*x.shape[:-1], -1, 32)
    scale = (blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True)) / -8).half().float()
    codes = (blocks * torch.where(scale == 0, 0.0, 1 / scale) + 8.5).floor().clamp(0, 15)
    return rotate_head(((codes - 8) * scale).reshape(x.shape))


@pytest.mark.slow
def test_the_bars_hold_on_a_trained_model(shared_models: Path, shared_data: Path) -> None:
    """E22."""
    directory = shared_models / "wikitext-qwen2-6m"
    model: Any = load(directory, dtype=torch.float32)
    text = (shared_data / "wikitext-2" / "test.txt").read_text(encoding="utf-8")[:60_000].replace("<unk>", "unknown")
    ids = load_tokenizer(directory)(text, add_special_tokens=False)["input_ids"][: WINDOWS * LENGTH]
    windows = torch.tensor(ids).view(WINDOWS, LENGTH)
    caches: dict[str, Any] = {
        name: lambda name=name: QuantizedCache(model, name) for name in ("int8", "int4", "int4-rotated")
    }
    caches["q4_0"] = lambda: BlocksOf32(config=model.config)
    kl, top1 = dict.fromkeys(caches, 0.0), dict.fromkeys(caches, 0.0)
    with torch.no_grad():
        for window in windows:
            wanted = log_probabilities(model(input_ids=window[None], use_cache=False).logits[0])
            for name, make in caches.items():
                found = log_probabilities(model(input_ids=window[None], past_key_values=make()).logits[0])
                kl[name] += float(divergence(wanted, found).mean()) / WINDOWS
                top1[name] += float(agreement(wanted, found).double().mean()) / WINDOWS
    assert kl["int8"] <= 1e-3
    assert top1["int8"] >= 0.995
    assert kl["int4-rotated"] <= 0.65 * kl["int4"]
    assert kl["int4-rotated"] <= 1.1 * kl["q4_0"]
