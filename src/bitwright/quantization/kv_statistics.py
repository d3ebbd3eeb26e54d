"""What calibration remembers of keys, values, and the inputs and outputs of linear layers: extremes and means."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.core.errors import BitwrightError
from bitwright.models.empty_cache import EmptyCache
from bitwright.models.kv_storage import Side

__all__ = ["KINDS", "Extent", "KVObserver", "Observation", "observed_linears"]

KINDS = ("key", "value", "inputs", "outputs")
ENDS = ("min", "max", "absmax", "mean")


@dataclass(slots=True)
class Extent:
    """Least, greatest and mean number of each channel so far; ``total`` is a sum in float64 over ``count`` tokens.

    The order in which tokens come does not matter to ``low`` and ``high``.
    """

    low: Tensor
    high: Tensor
    total: Tensor
    count: int

    @classmethod
    def of(cls, numbers: Tensor) -> Extent:
        """Of numbers ``[tokens, ...]``, of any float dtype."""
        exact = numbers.to(torch.float32)
        total = exact.to(torch.float64).sum(0)
        return cls(exact.amin(0), exact.amax(0), total, len(numbers))

    def add(self, other: Extent) -> None:
        self.low = torch.minimum(self.low, other.low)
        self.high = torch.maximum(self.high, other.high)
        self.total, self.count = self.total + other.total, self.count + other.count

    def tensors(self) -> dict[str, Tensor]:
        """As they are saved: min, max, absmax, mean, float32."""
        largest = torch.maximum(self.low.abs(), self.high.abs())
        return dict(zip(ENDS, (self.low, self.high, largest, (self.total / self.count).float()), strict=True))


@dataclass(slots=True)
class Observation:
    """Extents by kind (``KINDS``) and name: keys and values by the number of their layer (``[heads, head_dim]``),
    inputs and outputs by the full name of the linear layer (``[features]``)."""

    extents: dict[str, dict[str, Extent]] = field(default_factory=lambda: {kind: {} for kind in KINDS})

    def add(self, kind: str, name: str, numbers: Tensor) -> None:
        """Add numbers ``[tokens, ...]``.

        Raises:
            BitwrightError: BW602 naming what is not finite.
        """
        if not len(numbers):
            return
        found = Extent.of(numbers)
        if not bool(torch.isfinite(found.total).all()):
            what = f"NaN or infinity among the {kind} numbers of {'layer ' if name.isdigit() else ''}{name}"
            raise BitwrightError("BW602", what, suggestion="check the weights and the dtype that the model runs in")
        known = self.extents[kind].get(name)
        if known is None:
            self.extents[kind][name] = found
        else:
            known.add(found)

    def tensors(self) -> dict[str, Tensor]:
        """All of it by name: ``key.3.max``, ``inputs.model.layers.0.mlp.up_proj.mean``."""
        return {
            f"{kind}.{name}.{end}": tensor
            for kind, extents in self.extents.items()
            for name, extent in extents.items()
            for end, tensor in extent.tensors().items()
        }


class KVObserver(EmptyCache):
    """Stands in for a cache: sees keys (after the rotary embedding) and values as a model stores them, keeps none."""

    def __init__(self, observation: Observation) -> None:
        super().__init__()
        self.observation = observation

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Note keys and values ``[batch, heads, tokens, head_dim]``, and return them."""
        both: tuple[tuple[Side, Tensor], ...] = (("key", key_states), ("value", value_states))
        for side, states in both:
            self.observation.add(side, str(layer_idx), states.transpose(1, 2).flatten(0, 1))
        return key_states, value_states


@contextmanager
def observed_linears(layers: Mapping[str, nn.Module], observation: Observation) -> Iterator[None]:
    """Note what goes into and comes out of linear ``layers`` for as long as this lasts."""

    def note(name: str, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        observation.add("inputs", name, arguments[0].detach().flatten(0, -2))
        observation.add("outputs", name, output.detach().flatten(0, -2))

    hooks = [
        layer.register_forward_hook(lambda _, arguments, output, name=name: note(name, arguments, output))
        for name, layer in layers.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
