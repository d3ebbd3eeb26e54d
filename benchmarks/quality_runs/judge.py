"""The one judge of all methods: a model, or a float state dict, beside the float model on the held-out windows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

import bitwright
from benchmarks.quality_runs.material import Material
from bitwright.evaluation.measurement import Measurement, ModelLogits, measure

__all__ = ["float_model", "judge", "load_weights"]

BATCH = 4


def float_model(material: Material) -> nn.Module:
    """The model before quantization, in float32."""
    model: nn.Module = bitwright.load(material.directory, dtype=torch.float32)
    return model


def load_weights(material: Material, weights: Mapping[str, Tensor]) -> nn.Module:
    """The float model with ``weights`` (dequantized, by their names in the model) in place of its own.

    Raises:
        ValueError: for a name that the model does not have, for a linear weight that is missing or as it was (but for a
            rounding to 16 bits), and for a value that is not finite.
    """
    model = float_model(material)
    state = model.state_dict()
    unknown = sorted(set(weights) - set(state))
    missing = sorted(name for name in state if name.endswith("proj.weight") and name not in weights)
    if unknown or missing:
        raise ValueError(f"unknown weights {unknown[:3]}, missing weights {missing[:3]}")
    kept = [name for name in weights if name.endswith("proj.weight") and _is_kept(weights[name], state[name])]
    if kept:
        raise ValueError(f"{len(kept)} layers are left as they were, {kept[0]} among them")
    for name, value in weights.items():
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} is not finite")
    model.load_state_dict({name: value.to(torch.float32) for name, value in weights.items()}, strict=False)
    return model


def _is_kept(found: Tensor, given: Tensor) -> bool:
    return any(torch.equal(found.to(dtype), given.to(dtype)) for dtype in (torch.float16, torch.bfloat16))


def judge(material: Material, model: nn.Module | None, reference: nn.Module) -> dict[str, Any]:
    """Perplexity, KL to ``reference`` and top-1 with 95% intervals; ``None`` measures the reference itself.

    ``kl_windows`` and ``loss_windows`` are sums over each window, so that two methods can be compared window by window.
    """
    source = ModelLogits(reference if model is None else model, material.heldout)
    beside = None if model is None else ModelLogits(reference, material.heldout)
    found = measure(source, material.heldout, batch=BATCH, reference=beside)
    perplexity, perplexity_ci = found.perplexity()
    record = {"ppl": perplexity, "ppl_ci": perplexity_ci, "tokens": found.tokens}
    record["loss_windows"] = [round(value, 6) for value in found.losses.tolist()]
    return record if model is None else record | _beside(found)


def _beside(found: Measurement) -> dict[str, Any]:
    assert found.divergences is not None
    divergence, top1 = found.mean_divergence(), found.top1()
    assert divergence is not None and top1 is not None
    windows = [float(part.sum()) for part in torch.split(found.divergences, found.counts.tolist())]
    return {
        "kl": divergence[0],
        "kl_ci": divergence[1],
        "kl_p99": found.high_divergence(),
        "top1": top1[0],
        "top1_ci": top1[1],
        "kl_windows": [float(f"{value:.7g}") for value in windows],
    }
