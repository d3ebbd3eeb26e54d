"""AWQ: columns that meet large activations are multiplied before rounding, their activations divided (Lin et al. 2023).

For each site the scale is searched on a grid, each candidate judged by the squared error of what the site really makes
when its weights are rounded in their true scheme. Then ranges are clipped, group by group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError
from bitwright.core.grid import FitOptions, Range
from bitwright.core.scheme import QuantScheme
from bitwright.models.blocks import linear_weight
from bitwright.models.folding import share_scale
from bitwright.models.sites import Site
from bitwright.quantization.awq_clip import apply_ratios, search_ratios
from bitwright.quantization.rtn import RtnOptions, refuse_range, round_to_nearest
from bitwright.quantization.smoothing import (
    SiteBench,
    apply_scale,
    fake_quantize,
    judged_samples,
    mean_magnitude,
    open_bench,
    refuse_options,
    scale_weight,
    task_sites,
)
from bitwright.quantization.stages import BlockTask, Equalizer, Rounder, Stage

__all__ = [
    "AWQ",
    "AWQ_ROUND",
    "AWQ_SCALE",
    "AwqOptions",
    "AwqRoundOptions",
    "AwqScaleOptions",
    "candidate_scales",
    "clip_and_scale",
    "scale_by_activation",
]

JUDGED_SAMPLES = 8  # about so many, of 512 tokens each, judge a candidate (``tokens``)
LIMIT = 1024.0  # no channel is scaled by more: a 16-bit norm must still hold its weight


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqScaleOptions:
    """How scales are searched.

    Attributes:
        scale: search a scale for each site.
        folding: scale only where the scale can be folded into the layer before. Otherwise a site without such a layer
            keeps a vector by which its input is multiplied while the model runs.
        grid: how many steps the exponent takes from 0 to 1.
        tokens: candidates are judged on whole calibration samples of so many tokens together (one sample at least).
        range: where the rounder that follows puts the largest weight (see ``rtn``); ``either``: for each group of a
            symmetric scheme the better of ``restricted`` and ``full``.
        search: whether that rounder tries shrunk ranges.
    """

    scale: bool = True
    folding: bool = True
    grid: int = 20
    tokens: int = 4096
    range: Range = "restricted"
    search: bool = False

    def __post_init__(self) -> None:
        FitOptions(symmetric_range=self.range, search=self.search)
        for field, value in (("grid", self.grid), ("tokens", self.tokens)):
            if type(value) is not int or value < 1:
                raise ArgumentError("BW201", f"{field} is {value!r}", suggestion="a whole number from 1")

    @property
    def fit(self) -> FitOptions:
        return FitOptions(symmetric_range=self.range, search=self.search)


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqOptions(AwqScaleOptions):
    """How scales and clipped ranges are searched.

    Attributes:
        clip: search, for each group of weights, a range that is narrower than the largest weight.
    """

    range: Range = "either"
    clip: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class AwqRoundOptions(RtnOptions):
    """How equalized and clipped weights are rounded to nearest: by what AWQ judges."""

    range: Range = "either"


def clip_and_scale(task: BlockTask, options: AwqOptions) -> Mapping[str, Tensor]:
    """Equalize and clip a block in place: the whole of AWQ but the rounding.

    Returns what could not be folded: by layer, the float32 vector ``[in]`` that multiplies its input at run time.

    Raises:
        BitwrightError: BW201 for a range that a layer's scheme cannot take.
    """
    refuse_options(task, options.fit)
    with ExitStack() as hooks:
        sites = task_sites(task)
        multipliers = _scale_sites(task, sites, options, hooks)
        if options.clip:
            _clip_sites(task, sites, options)
    return multipliers


def scale_by_activation(task: BlockTask, options: AwqScaleOptions) -> Mapping[str, Tensor]:
    """Equalize a block in place, as :func:`clip_and_scale` without clipping: for rounders that choose ranges better."""
    refuse_options(task, options.fit)
    with ExitStack() as hooks:
        return _scale_sites(task, task_sites(task), options, hooks)


def candidate_scales(activations: Tensor, weights: Tensor, grid: int) -> Iterator[Tensor]:
    """The scales to try, float32 ``[in]``: none first, then ``x^a`` and ``x^a / w^(1-a)`` for a in steps of 1/grid.

    ``activations`` and ``weights`` are the mean magnitudes ``[in]`` of each channel and column. Each candidate is
    divided by the geometric mean of its extremes (rounding does not see a common factor); channels without activations
    or weights keep 1.
    """
    x, w = activations.to(torch.float64), weights.to(torch.float64)
    live = (x > 0) & (w > 0)
    yield torch.ones_like(x, dtype=torch.float32)
    if not live.any():
        return
    x, w = torch.where(live, x, 1.0), torch.where(live, w, 1.0)
    exponents = [step / grid for step in range(grid + 1)]
    powers = [x**a for a in exponents[1:]] + [x**a / w ** (1 - a) for a in exponents[:-1]]
    for power in powers:
        seen = power[live]
        scale = (power / (seen.max() * seen.min()).sqrt()).clamp(1 / LIMIT, LIMIT)
        yield torch.where(live, scale, 1.0).to(torch.float32)


def _scale_sites(
    task: BlockTask, sites: tuple[Site, ...], options: AwqScaleOptions, hooks: ExitStack
) -> dict[str, Tensor]:
    multipliers: dict[str, Tensor] = {}
    samples = judged_samples(task, options.tokens)
    for site in sites if options.scale else ():
        if site.fold is None and options.folding:
            apply_scale(task, site, torch.ones(site.width, dtype=torch.float32), folding=True, hooks=hooks)
            continue
        bench = open_bench(task, site, samples)
        ones = torch.ones(site.width, dtype=torch.float32)
        scale = ones if bench is None else _search_scale(task, site, bench, options)
        if not bool((scale == 1).all()):
            multipliers |= apply_scale(task, site, scale, folding=options.folding, hooks=hooks) or {}
    return multipliers


def _search_scale(task: BlockTask, site: Site, bench: SiteBench, options: AwqScaleOptions) -> Tensor:
    """The candidate of least loss; the first of equals, so that none wins where nothing is gained."""
    weights = {name: linear_weight(layer) for name, layer in bench.layers.items()}
    rows = sum(weight.shape[0] for weight in weights.values())
    first, *others = (weight.abs().sum(0, dtype=torch.float32) for weight in weights.values())
    columns = sum(others, first) / rows
    activations = share_scale(site.fold, mean_magnitude(task, site).to(columns.device))
    least, best = float("inf"), torch.ones_like(columns)
    for scale in candidate_scales(activations, share_scale(site.fold, columns), options.grid):
        rounded = {}
        for name, weight in weights.items():
            held = scale_weight(weight, scale)
            rounded[name] = fake_quantize(
                held, task.linears[name].weight, options.fit, dtype=bench.dtype(name), divisor=scale
            )
        loss = bench.loss(rounded)
        if loss < least:
            least, best = loss, scale
    return best


def _clip_sites(task: BlockTask, sites: tuple[Site, ...], options: AwqOptions) -> None:
    """Clip each layer where that lowers the loss of its site; all at the end, so that every site sees float inputs."""
    samples = judged_samples(task, options.tokens)
    chosen: dict[str, Tensor] = {}
    for site in sites:
        bench = open_bench(task, site, samples)
        if bench is None:
            continue
        weights = {name: linear_weight(layer) for name, layer in bench.layers.items()}
        best = {
            name: fake_quantize(weight, task.linears[name].weight, options.fit, dtype=bench.dtype(name))
            for name, weight in weights.items()
        }
        least = bench.loss(best)
        for name, weight in weights.items():
            scheme = task.linears[name].weight
            ratios = search_ratios(weight, bench.inputs[name], scheme, options.fit)
            clipped = apply_ratios(weight.clone(), ratios, scheme)
            tried = {**best, name: fake_quantize(clipped, scheme, options.fit, dtype=bench.dtype(name))}
            loss = bench.loss(tried)
            if loss < least:
                least, best, chosen[name] = loss, tried, ratios
    for name, ratios in chosen.items():
        apply_ratios(linear_weight(task.layers[name]), ratios, task.linears[name].weight)


def _passes(options: AwqScaleOptions, samples: int) -> float:
    searches = 2 if getattr(options, "clip", False) else 1
    return searches * options.grid * min(samples, JUDGED_SAMPLES)


def _refuse(scheme: QuantScheme, options: AwqScaleOptions) -> str | None:
    return options.fit.refuse(scheme)


AWQ: Stage[Equalizer] = Stage("awq", AwqOptions, clip_and_scale, _refuse, _passes)
AWQ_ROUND: Stage[Rounder] = Stage("rtn", AwqRoundOptions, round_to_nearest, refuse_range)
AWQ_SCALE: Stage[Equalizer] = Stage("awq", AwqScaleOptions, scale_by_activation, _refuse, _passes)
