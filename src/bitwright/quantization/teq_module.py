"""TEQ's trainable form: layers that divide their input by a vector, multiply their columns by it, and round those.

The vectors are ordinary parameters of the model, so that any training loop can be run on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from bitwright.core.grid import FitOptions
from bitwright.core.scheme import LayerScheme, QuantScheme
from bitwright.models.blocks import linear_weight, set_module
from bitwright.models.sites import Site
from bitwright.quantization.smoothing import fake_quantize

__all__ = ["LEAST", "ScaledLinear", "SiteScale", "TrainableSites", "group_ranges", "insert_scales"]

LEAST = 1e-3  # no component of a scale becomes smaller: it must stay positive, and invertible in half precision


class SiteScale(nn.Module):
    """The trainable scale of a site: one positive number for each channel that may have its own.

    ``index`` says which number belongs to each input channel: query heads that share a key-value head share them.
    """

    index: Tensor

    def __init__(self, site: Site) -> None:
        super().__init__()
        rows = torch.arange(site.width) if site.fold is None else site.fold.rows
        _, index = torch.unique(rows, return_inverse=True)
        self.register_buffer("index", index, persistent=False)
        self.alpha = nn.Parameter(torch.ones(int(index.max()) + 1))

    def forward(self) -> Tensor:
        """The scale, ``[in]`` float32."""
        return self.alpha.clamp(min=LEAST)[self.index]


class ScaledLinear(nn.Module):
    """``y = (x / s) Q(W s / p)ᵀ + b / p``: ``layer`` with its weight rounded in its true scheme at trainable scales.

    ``s`` is the scale of its own input; ``p`` that of the site which the layer's output feeds, where it can take it in.
    Where the layer before takes in ``s``, ``x`` comes divided already. Rounding passes gradients straight through
    (Bengio et al. 2013), and the layer's own weight is never trained.
    """

    def __init__(self, layer: nn.Module, scheme: QuantScheme, options: FitOptions) -> None:
        super().__init__()
        self.layer, self.scheme, self.options = layer, scheme, options
        self.input_scale: SiteScale | None = None
        self.output_scale: SiteScale | None = None
        self.output_rows: Tensor | None = None
        self.is_divided_before = False
        self.prepared: dict[str, Tensor] | None = None

    def rounded(self) -> dict[str, Tensor]:
        """The parameters that the layer runs with, in its own layout and dtype; gradients reach the scales."""
        weight, bias = linear_weight(self.layer).detach(), getattr(self.layer, "bias", None)
        scaled = weight.to(torch.float32)
        if self.input_scale is not None:
            scaled = scaled * self.input_scale()
        parameters: dict[str, Tensor] = {}
        if self.output_scale is not None and self.output_rows is not None:
            divisor = torch.ones(weight.shape[0], device=weight.device)
            divisor = divisor.index_put((self.output_rows.to(weight.device),), self.output_scale())
            scaled = scaled / divisor[:, None]
            if isinstance(bias, Tensor):
                parameters["bias"] = (bias.detach().to(torch.float32) / divisor).to(bias.dtype)
        held = scaled.detach().to(weight.dtype)  # what the block will really hold
        nearest = fake_quantize(held, self.scheme, self.options)
        range_ = group_ranges(scaled, self.scheme)
        growth = range_ / range_.detach().clamp(min=torch.finfo(torch.float32).tiny)
        straight: Any = _StraightThrough.apply
        passed: Tensor = straight(scaled + (nearest - scaled.detach()) * growth, nearest)
        passed = passed.to(weight.dtype)
        parameters["weight"] = passed if isinstance(self.layer, nn.Linear) else passed.t()
        return parameters

    def forward(self, x: Tensor) -> Any:
        """``x [..., in]`` to ``[..., out]``."""
        if self.input_scale is not None and not self.is_divided_before:
            x = (x.to(torch.float32) / self.input_scale()).to(x.dtype)
        return functional_call(self.layer, self.rounded() if self.prepared is None else self.prepared, (x,))

    @property
    def weight(self) -> Tensor:
        """The float weight: models look at its dtype."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight


def group_ranges(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """What the scale of each weight's group is proportional to, in the weight's shape: ``[out, in]`` float32.

    The largest magnitude of symmetric groups and of codebooks, the mean one of 1-bit groups, else the width of the
    range with zero in it (without, for float zero points).
    """
    rows = weight if scheme.axis == 1 else weight.t()
    group = rows.shape[1] if scheme.group is None else min(scheme.group, rows.shape[1])
    pieces = []
    for part in torch.split(rows, group, dim=1):
        if scheme.symmetric or scheme.is_codebook:
            size = part.abs().mean(1, True) if scheme.bits == 1 else part.abs().amax(1, True)
        elif scheme.zero == "float":
            size = part.amax(1, True) - part.amin(1, True)
        else:
            size = part.amax(1, True).clamp(min=0) - part.amin(1, True).clamp(max=0)
        pieces.append(size.expand_as(part))
    found = torch.cat(pieces, dim=1)
    return found if scheme.axis == 1 else found.t()


class _StraightThrough(torch.autograd.Function):
    """Forward: the rounded values, bit for bit. Backward: as if nothing had been rounded."""

    @staticmethod
    def forward(ctx: Any, scaled: Tensor, nearest: Tensor) -> Tensor:
        return nearest.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainableSites:
    """Trainable scales in the place of a module's layers.

    Attributes:
        root: the module that holds the layers.
        name: of ``root`` in the model; the layers' full names begin with it.
        layers: the float layers by full name, as they were.
        scaled: what stands in their place.
        scales: the sites, each with its scale.
    """

    root: nn.Module
    name: str
    layers: Mapping[str, nn.Module]
    scaled: Mapping[str, ScaledLinear]
    scales: tuple[tuple[Site, SiteScale], ...]

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        return [scale.alpha for _, scale in self.scales]

    def values(self) -> tuple[Tensor, ...]:
        """The scale of each site as it is now: ``[in]`` float32."""
        return tuple(scale().detach().clone() for _, scale in self.scales)

    def remove(self) -> None:
        """Put the float layers back."""
        for path, layer in self.layers.items():
            set_module(self.root, path.removeprefix(self.name).removeprefix("."), layer)


def insert_scales(
    root: nn.Module,
    name: str,
    layers: Mapping[str, nn.Module],
    schemes: Mapping[str, LayerScheme],
    sites: Sequence[Site],
    options: FitOptions,
) -> TrainableSites:
    """Put a :class:`ScaledLinear` in the place of each of ``layers`` below ``root`` (called ``name`` in the model).

    Every site gets a scale of ones, so that the module computes what rounding to nearest makes of it.
    """
    scaled = {path: ScaledLinear(layer, schemes[path].weight, options) for path, layer in layers.items()}
    scales = tuple((site, SiteScale(site).to(linear_weight(layers[site.layers[0]]).device)) for site in sites)
    for site, scale in scales:
        producer = scaled.get(site.fold.producer) if site.fold is not None else None
        if producer is not None and site.fold is not None and set(site.readers) == set(site.layers):
            producer.output_scale, producer.output_rows = scale, site.fold.rows
        for path in site.layers:
            scaled[path].input_scale = scale
            scaled[path].is_divided_before = producer is not None and producer.output_scale is scale
    for path, module in scaled.items():
        set_module(root, path.removeprefix(name).removeprefix("."), module)
    return TrainableSites(root=root, name=name, layers=dict(layers), scaled=scaled, scales=scales)
