"""What every gradient-based pass shares: a block whose rounded weights have gradients, Adam, and a schedule."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from bitwright.models.blocks import set_module
from bitwright.quantization.fake_quant import CodeWeight
from bitwright.quantization.products import multiply

__all__ = [
    "FORWARD_AND_BACKWARD", "Adam", "TunedBlock", "TunedLinear", "draw_batches", "gradients_enabled", "learning_rate",
    "stand_ins",
]  # fmt: skip

FORWARD_AND_BACKWARD = 3  # passes: the products of a backward pass are twice those of a forward one


class TunedLinear(nn.Module):
    """Stands in for a linear layer while its weight (``[out, in]``, a leaf with a gradient) is being tuned."""

    def __init__(self, weight: Tensor, bias: Tensor | None, input_scale: Tensor | None = None) -> None:
        super().__init__()
        self.weight = weight  # no parameter: the block's own parameters stay those of norms
        self.bias = bias
        self.input_scale = input_scale

    def forward(self, x: Tensor) -> Tensor:
        if self.input_scale is not None:
            x = x * self.input_scale.to(x.dtype)
        return multiply(x, self.weight, self.bias)


@contextmanager
def stand_ins(block: nn.Module, layers: Mapping[str, nn.Module]) -> Iterator[dict[str, TunedLinear]]:
    """Put stand-ins for ``layers`` (by any names; they are found by identity) into ``block`` for a while; all its other
    parameters have no gradients then."""
    places = _places(block, layers)
    placed = {name: _stand_in(layer) for name, layer in layers.items()}
    learning = [parameter for parameter in block.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        for name, place in places.items():
            set_module(block, place, placed[name])
        yield placed
    finally:
        for name, place in places.items():
            set_module(block, place, layers[name])
        for parameter in learning:
            parameter.requires_grad_(True)


class TunedBlock:
    """A block with stand-ins for its quantized layers, and every number of it that may move, by name.

    ``values`` are float32 tensors, changed in place by an optimizer, then made effective by :meth:`refresh`:

    - ``LAYER.position``, ``LAYER.scale``, ``LAYER.zero``: those of the layer's :class:`CodeWeight`;
    - ``LAYER.bias`` and ``NORM.weight`` (any parameter of one dimension): moves in units of the parameter's root mean
      square, 0 at the start, so that one step size suits them all.

    Layers may have any names; vectors are named within the block.
    """

    def __init__(
        self,
        block: nn.Module,
        layers: Mapping[str, nn.Module],
        weights: Mapping[str, CodeWeight],
        dtype: torch.dtype,
        *,
        with_vectors: bool = True,
    ) -> None:
        self.block, self.layers, self.weights, self.dtype = block, layers, weights, dtype
        self.vectors = _vectors(block, self.layers) if with_vectors else {}
        self.learning = [parameter for parameter in block.parameters() if parameter.requires_grad]
        for parameter in self.learning:
            parameter.requires_grad_(False)
        self.starts = {name: vector.detach().to(torch.float32).clone() for name, vector in self.vectors.items()}
        self.units = {name: start.square().mean().sqrt() for name, start in self.starts.items()}
        self.values: dict[str, Tensor] = {}
        for name, weight in self.weights.items():
            if weight.position is not None:
                self.values[f"{name}.position"] = weight.position
            if isinstance(weight.base.scale, Tensor):
                self.values[f"{name}.scale"] = weight.scale
            if weight.zero is not None:
                self.values[f"{name}.zero"] = weight.zero
        self.values |= {name: torch.zeros_like(start) for name, start in self.starts.items() if self.units[name] > 0}
        self.places = _places(block, layers)
        self.stand_ins = {name: _stand_in(layer) for name, layer in layers.items()}
        for vector in self.vectors.values():
            vector.requires_grad_(True)
        for name, place in self.places.items():
            set_module(block, place, self.stand_ins[name])
        self.refresh()

    def refresh(self) -> None:
        """Decode every weight anew from the values, and clear the gradients."""
        for name, stand_in in self.stand_ins.items():
            stand_in.weight = self.weights[name].decode(self.dtype).requires_grad_()
        with torch.no_grad():
            for name, vector in self.vectors.items():
                if name in self.values:
                    vector.copy_(self.starts[name] + self.units[name] * self.values[name])
                vector.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """Of each of ``values``, after a backward pass through the block."""
        found: dict[str, Tensor] = {}
        for name, stand_in in self.stand_ins.items():
            if stand_in.weight.grad is None:
                continue
            gradients = self.weights[name].gradients(stand_in.weight.grad)
            parts = {"position": gradients.position, "scale": gradients.scale, "zero": gradients.zero}
            found |= {f"{name}.{part}": grad for part, grad in parts.items() if grad is not None}
        for name, vector in self.vectors.items():
            if vector.grad is not None:
                found[name] = vector.grad.to(torch.float32) * self.units[name]
        return {name: grad for name, grad in found.items() if name in self.values}

    def snapshot(self) -> dict[str, Tensor]:
        """A copy of ``values``."""
        return {name: value.clone() for name, value in self.values.items()}

    def restore(self, values: Mapping[str, Tensor]) -> None:
        """Take ``values`` over and make them effective."""
        for name, value in self.values.items():
            value.copy_(values[name])
        self.refresh()

    def changed_vectors(self) -> dict[str, Tensor]:
        """Biases and norm weights as they are now, by name, in their own dtype."""
        return {name: self.vectors[name].detach().clone() for name in self.vectors if name in self.values}

    def release(self, *, keep_vectors: bool) -> None:
        """Put the original layers back; biases and norm weights keep their new numbers or get their old ones."""
        for name, place in self.places.items():
            set_module(self.block, place, self.layers[name])
        with torch.no_grad():
            for name, vector in self.vectors.items():
                if not keep_vectors:
                    vector.copy_(self.starts[name])
                vector.grad = None
                vector.requires_grad_(False)
        for parameter in self.learning:
            parameter.requires_grad_(True)


class Adam:
    """Adam (Kingma, Ba 2014, algorithm 1) on named tensors, with a state that is a plain dict of tensors."""

    def __init__(self, *, momentum: float = 0.9, memory: float = 0.99, floor: float = 1e-12) -> None:
        self.momentum, self.memory, self.floor = momentum, memory, floor
        self.count = 0
        self.first: dict[str, Tensor] = {}
        self.second: dict[str, Tensor] = {}

    def begin(self) -> None:
        """Count a step; :meth:`update` may then be called for some of the tensors at a time."""
        self.count += 1

    def update(self, values: Mapping[str, Tensor], gradients: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """Move each of ``values`` in place; ``rates``: step sizes by the last part of a name, ``""`` for the others."""
        for name, gradient in gradients.items():
            first = self.first.setdefault(name, torch.zeros_like(gradient)).lerp_(gradient, 1 - self.momentum)
            second = self.second.setdefault(name, torch.zeros_like(gradient))
            second.mul_(self.memory).addcmul_(gradient, gradient, value=1 - self.memory)
            size = (second / (1 - self.memory**self.count)).sqrt_().add_(self.floor)
            rate = rates.get(name.rpartition(".")[2], rates[""])
            values[name].addcdiv_(first, size, value=-rate / (1 - self.momentum**self.count))

    def state(self) -> dict[str, Tensor]:
        """Everything needed to go on: ``step``, ``first.NAME``, ``second.NAME``."""
        first = {f"first.{name}": value.clone() for name, value in self.first.items()}
        second = {f"second.{name}": value.clone() for name, value in self.second.items()}
        return {"step": torch.tensor(self.count), **first, **second}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from ``state``."""
        self.count = int(state["step"])
        for name, value in state.items():
            kind, _, rest = name.partition(".")
            if kind in ("first", "second"):
                (self.first if kind == "first" else self.second)[rest] = value.clone()


def learning_rate(step: int, steps: int, *, warmup: float = 0.1, wait: float = 0.0) -> float:
    """The part of the full step size in ``step`` (0-based) of ``steps``: a linear start, then half a cosine to 0.

    ``wait`` is the part of all steps in which nothing moves yet. Adam's first steps follow single batches, and codes
    that lie beside their rounding boundary would follow them over it; once its sums have settled they do not.
    """
    waiting = round(wait * steps)
    if step < waiting:
        return 0.0
    step, steps = step - waiting, steps - waiting
    start = max(1, round(warmup * steps))
    if step < start:
        return (step + 1) / start
    return 0.5 * (1 + math.cos(math.pi * (step - start) / max(1, steps - start)))


def draw_batches(samples: Sequence[int], size: int, generator: torch.Generator) -> Iterator[list[int]]:
    """Endless batches of ``size`` of ``samples``, each pass over them in an order of its own."""
    waiting: list[int] = []
    while True:
        while len(waiting) < min(size, len(samples)):
            waiting += [samples[index] for index in torch.randperm(len(samples), generator=generator).tolist()]
        yield waiting[:size]
        waiting = waiting[size:]


@contextmanager
def gradients_enabled() -> Iterator[None]:
    """Gradients, whatever the caller has turned off."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _places(block: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, str]:
    """Where each of ``layers`` is in ``block``, by the name that it has there."""
    names = {id(layer): name for name, layer in layers.items()}
    return {names[id(module)]: place for place, module in block.named_modules() if id(module) in names}


def _stand_in(layer: nn.Module) -> TunedLinear:
    bias, scale = getattr(layer, "bias", None), getattr(layer, "input_scale", None)
    return TunedLinear(torch.empty(0), bias, scale)


def _vectors(block: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """The block's parameters of one dimension, by name: norm weights, biases."""
    weights = {id(getattr(layer, "weight", None)) for layer in layers.values()}
    return {
        name: parameter
        for name, parameter in block.named_parameters()
        if parameter.dim() == 1 and parameter.is_floating_point() and id(parameter) not in weights
    }
