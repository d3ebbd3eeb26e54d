"""Is a cache scheme safe for this model? Each layer alone, then all together, beside the float cache on some text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from bitwright.core.kv_scheme import KVScheme, kv_bytes, parse_kv
from bitwright.evaluation.divergence import agreement, divergence
from bitwright.evaluation.kv_models import CachedModel
from bitwright.evaluation.perplexity import log_probabilities
from bitwright.models.hf import PreTrainedModel
from bitwright.models.kv_cache import QuantizedCache
from bitwright.quantization.kv_statistics import KVObserver, Observation

__all__ = ["CHECKED", "KVCheck", "LayerCheck", "SchemeCheck", "check_kv"]

CHECKED = ("int4", "int4-rotated", "int8")
LAYER_LIMIT = 0.01  # nats per token that one layer may cost
TOTAL_LIMIT, AGREEMENT = 0.03, 0.97  # of the scheme that is recommended
# What a layer that is unsafe in 4 bits gets instead: the first of these that is safe.
LADDER = ("k8v4-rotated", "int8", "int8-rotated", "k(float)v(int4-rotated)", "none")
FALLBACKS = ("k8v4-rotated", "int8", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCheck:
    """One layer alone in each scheme, all others float.

    Attributes:
        kl: mean KL divergence of the predictions, by scheme.
        key_offset: norm of the mean key over heads and channels: what a bias of the key projection adds to all tokens.
        key_spread: norm of the standard deviation about it.
        unsafe: why 4 bits are unsafe here, or the empty string.
        instead: the scheme recommended for this layer where they are.
    """

    layer: int
    kl: Mapping[str, float]
    key_offset: float
    key_spread: float
    unsafe: str
    instead: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SchemeCheck:
    """A scheme in all layers: mean KL divergence, share of equal likeliest tokens, bytes of a token."""

    scheme: str
    kl: float
    top1: float
    bytes_per_token: float


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCheck:
    """What was found; ``recommended`` is the smallest scheme that was found safe."""

    layers: tuple[LayerCheck, ...]
    schemes: tuple[SchemeCheck, ...]
    recommended: str
    tokens: int

    @property
    def unsafe(self) -> tuple[int, ...]:
        """The layers in which 4-bit codes are unsafe."""
        return tuple(layer.layer for layer in self.layers if layer.unsafe)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def check_kv(
    model: PreTrainedModel,
    windows: Tensor,
    *,
    schemes: Sequence[str] = CHECKED,
    on_step: Callable[[str], None] = lambda message: None,
) -> KVCheck:
    """Measure cache schemes on ``windows`` (int64 ``[samples, tokens]``).

    A layer is unsafe if either 4-bit scheme of ``schemes`` costs more than a hundredth of a nat there alone. The
    recommended scheme is ``int4-rotated`` with, in those layers, the first of a ladder of wider codes that is safe; or
    a wider one for all, if the whole is not safe.

    Example:
        >>> check_kv(model, windows).recommended
        'int4-rotated/1:int8'
    """
    meter = _Meter(model, windows)
    count = len(QuantizedCache(model, "none").layers)
    offsets = _key_offsets(model, windows, count)
    layers: list[LayerCheck] = []
    for layer in range(count):
        on_step(f"layer {layer + 1} of {count}")
        found = {name: meter.measure(_only(layer, name))[0] for name in schemes}
        worst = max((found[name] for name in schemes if parse_kv(name).value.bits <= 4), default=0.0)
        offset, spread = offsets[layer]
        unsafe = _reason(worst, offset, spread) if worst > LAYER_LIMIT else ""
        instead = ""
        if unsafe and found.get("int4-rotated", worst) > LAYER_LIMIT:
            instead = next(name for name in LADDER if meter.measure(_only(layer, name))[0] <= LAYER_LIMIT)
        layers.append(
            LayerCheck(layer=layer, kl=found, key_offset=offset, key_spread=spread, unsafe=unsafe, instead=instead)
        )
    overrides = {layer.layer: parse_kv(layer.instead) for layer in layers if layer.instead}
    base = parse_kv("int4-rotated")
    mixed = KVScheme(key=base.key, value=base.value, overrides=overrides).name
    measured: dict[str, SchemeCheck] = {}
    recommended = "none"
    for name in dict.fromkeys([*schemes, mixed, *FALLBACKS]):
        on_step(name)
        kl, top1 = meter.measure(name)
        measured[name] = SchemeCheck(scheme=name, kl=kl, top1=top1, bytes_per_token=_token_bytes(model, name, count))
    for name in (mixed, *FALLBACKS):
        if measured[name].kl <= TOTAL_LIMIT and measured[name].top1 >= AGREEMENT:
            recommended = name
            break
    return KVCheck(
        layers=tuple(layers), schemes=tuple(measured.values()), recommended=recommended, tokens=windows.numel()
    )


class _Meter:
    """Mean divergence and agreement of a scheme, beside the model's predictions without a quantized cache."""

    def __init__(self, model: PreTrainedModel, windows: Tensor) -> None:
        self.model, self.windows = model, windows
        self.wanted = [self._read(model, window) for window in windows]
        self.known: dict[str, tuple[float, float]] = {}

    def measure(self, name: str) -> tuple[float, float]:
        scheme = parse_kv(name)
        if name not in self.known:
            cached = self.model if scheme.is_float else CachedModel(self.model, scheme)
            kl = top1 = 0.0
            for window, wanted in zip(self.windows, self.wanted, strict=True):
                reference = log_probabilities(wanted)
                found = log_probabilities(self._read(cached, window))
                kl += float(divergence(reference, found).mean())
                top1 += float(agreement(reference, found).double().mean())
            self.known[name] = kl / len(self.windows), top1 / len(self.windows)
        return self.known[name]

    @staticmethod
    def _read(model: Any, window: Tensor) -> Tensor:
        with torch.no_grad():
            logits: Tensor = model(input_ids=window.unsqueeze(0), use_cache=False).logits[0].float()
        return logits


def _only(layer: int, name: str) -> str:
    return f"none/{layer}:{name}"


def _reason(kl: float, offset: float, spread: float) -> str:
    if offset > 4 * spread:
        return f"all keys share an offset of norm {offset:.0f}, beside which they differ by {spread:.1f}"
    return f"keys or values have outliers: 4 bits cost {kl:.2g} nats a token"


def _key_offsets(model: PreTrainedModel, windows: Tensor, layers: int) -> list[tuple[float, float]]:
    """Norms of the mean key and of the standard deviation of each layer, before positions turn them where they do."""
    observation = Observation()
    with torch.no_grad():
        for window in windows:
            model(input_ids=window.unsqueeze(0), past_key_values=_Centred(observation), use_cache=True)
    found = []
    for layer in range(layers):
        mean, square = (observation.extents["key"][f"{layer}{part}"] for part in ("", "squared"))
        centre, power = mean.total / mean.count, square.total / square.count
        size = (power.sum() - centre.square().sum()).clamp(min=0).sqrt()
        found.append((float(centre.norm()), float(size)))
    return found


class _Centred(KVObserver):
    """Also sums squares, for the spread about the mean."""

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        keys = key_states.double().transpose(1, 2).flatten(0, 1)
        self.observation.add("key", str(layer_idx), keys)
        self.observation.add("key", f"{layer_idx}squared", keys.square())
        return key_states, value_states


def _token_bytes(model: PreTrainedModel, name: str, layers: int, tokens: int = 1024) -> float:
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return kv_bytes(parse_kv(name), layers=layers, kv_heads=heads, head_dim=width, tokens=tokens) / tokens
