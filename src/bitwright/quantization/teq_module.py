"""TEQ's trainable form: layers that divide their input by a vector, multiply their columns by it, and round those.

The vectors are ordinary parameters of the model, so that any training loop can be run on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from bitwright.core.grid import FitOptions, row_tiles
from bitwright.core.scheme import LayerScheme, QuantScheme
from bitwright.kernels import native_scaling
from bitwright.models.blocks import linear_weight, set_module
from bitwright.models.sites import Site
from bitwright.quantization.fake_quant import Groups
from bitwright.quantization.products import multiply
from bitwright.quantization.smoothing import fake_quantize, scale_weight

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
        self.alpha = nn.Parameter(torch.ones(int(index.max()) + 1, dtype=torch.float32))

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

    def rounded(self, known: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The parameters that the layer runs with, in its own layout and dtype; gradients reach the scales.

        ``known``: what this returned at the present scales, where it has been asked before.
        """
        weight, bias = linear_weight(self.layer).detach(), getattr(self.layer, "bias", None)
        scale = None if self.input_scale is None else self.input_scale()
        divisor: Tensor | None = None
        parameters: dict[str, Tensor] = {}
        if self.output_scale is not None and self.output_rows is not None:
            divisor = torch.ones(weight.shape[0], dtype=torch.float32, device=weight.device)
            divisor = divisor.index_put((self.output_rows.to(weight.device),), self.output_scale())
            if isinstance(bias, Tensor):
                parameters["bias"] = (bias.detach().to(torch.float32) / divisor).to(bias.dtype)
        is_turned = not isinstance(self.layer, nn.Linear)
        before = None if known is None else known["weight"].t() if is_turned else known["weight"]
        make: Any = _Rounded.apply
        rounded: Tensor = make(weight, scale, divisor, self.scheme, self.options, before)
        return parameters | {"weight": rounded.t() if is_turned else rounded}

    def forward(self, x: Tensor) -> Any:
        """``x [..., in]`` to ``[..., out]``."""
        if self.input_scale is not None and not self.is_divided_before:
            x = (x.to(torch.float32) / self.input_scale()).to(x.dtype)
        parameters = self.rounded() if self.prepared is None else self.prepared
        if _is_bare(self.layer):
            return multiply(x, parameters["weight"], parameters.get("bias", self.layer.bias))
        return functional_call(self.layer, parameters, (x,))

    @property
    def weight(self) -> Tensor:
        """The float weight: models look at its dtype."""
        weight = self.layer.weight
        assert isinstance(weight, Tensor)
        return weight


def _is_bare(layer: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether calling a layer is a linear product and nothing else: no hook of any kind, no ``forward`` of its own."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is nn.Linear and not any(hooks) and "forward" not in vars(layer)


def group_ranges(rows: Tensor, scheme: QuantScheme) -> Tensor:
    """What the scale of each group of ``rows`` (float32 ``[rows, columns]``) is proportional to: ``[rows, groups]``.

    The largest magnitude of symmetric groups and of codebooks, the sum of magnitudes of 1-bit groups, else the width of
    the range with zero in it (without, for float zero points).
    """
    groups = Groups.of(scheme, rows.shape[1])
    if scheme.symmetric and scheme.bits == 1:
        return groups.total(groups.split(rows.abs()))
    low, high = groups.extremes(rows)
    if scheme.symmetric or scheme.is_codebook:
        return torch.maximum(low.abs(), high.abs())
    return high - low if scheme.zero == "float" else high.clamp(min=0) - low.clamp(max=0)


class _Rounded(torch.autograd.Function):
    """``Q(W s / p)``, with the gradient of ``W s / p + (Q - W s / p) R / R'``: only the rounding is passed straight
    through, the step of a group follows its range ``R`` (``R'``: taken as a constant).

    Where groups lie within rows, all of a row goes with its ``1 / p``, so that the gradient of ``p`` is
    ``-sum(g Q) / p``.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        scale: Tensor | None,
        divisor: Tensor | None,
        scheme: QuantScheme,
        options: FitOptions,
        before: Tensor | None,
    ) -> Tensor:
        if before is not None:
            rounded = before.detach()
        else:
            held = scale_weight(weight, scale, divisor)  # what the block will really hold
            rounded = fake_quantize(held, scheme, options, dtype=weight.dtype)
        ctx.save_for_backward(weight, scale, divisor, rounded)
        ctx.scheme = scheme
        return rounded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scale, divisor, rounded = ctx.saved_tensors
        found = native_scaling.pull_back(weight, scale, divisor, rounded, grad.contiguous(), ctx.scheme)
        if found is not None:
            return None, None if scale is None else found[0], None if divisor is None else found[1], None, None, None
        by_scale = None if scale is None else torch.zeros_like(scale)
        by_divisor = None if divisor is None else torch.empty_like(divisor)
        turned = ctx.scheme.axis == 0  # then groups run across rows, and all of them are looked at together
        for rows in [slice(0, weight.shape[0])] if turned else row_tiles(weight):
            part, own, nearest = (values[rows].to(torch.float32) for values in (grad, weight, rounded))
            own = own if divisor is None else own / divisor[rows, None]
            scaled = own if scale is None else own * scale
            if turned:
                by_scaled = _by_scaled(part.t(), scaled.t(), nearest.t(), ctx.scheme).t()
            elif by_scale is not None:
                by_scaled = _by_scaled(part, scaled, nearest, ctx.scheme)
            if by_scale is not None:
                by_scale += (by_scaled * own).sum(0)
            if by_divisor is not None:
                moved = (by_scaled * scaled if turned else part * nearest).sum(1)
                by_divisor[rows] = -moved / divisor[rows]
        return None, by_scale, by_divisor, None, None, None


def _by_scaled(grad: Tensor, scaled: Tensor, nearest: Tensor, scheme: QuantScheme) -> Tensor:
    """From the gradient of the rounded weight to that of the scaled one, all float32 with groups along the rows."""
    groups = Groups.of(scheme, scaled.shape[1])
    along = groups.total(groups.split((nearest - scaled).mul_(grad)))
    with torch.enable_grad():
        scaled = scaled.requires_grad_()
        ranges = group_ranges(scaled, scheme)
        along /= ranges.detach().clamp(min=torch.finfo(torch.float32).tiny)
        (by_range,) = torch.autograd.grad(ranges, scaled, along)
    return by_range.add_(grad)


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
