"""What equalizers share: judging a scale by what a site really makes, and putting it into the block."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from bitwright.core import grid
from bitwright.core.errors import BitwrightError, Notice
from bitwright.core.grid import FitOptions, Parameters, row_tiles
from bitwright.core.memory import use_huge_pages
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme
from bitwright.kernels import native_scaling
from bitwright.models.blocks import linear_weight
from bitwright.models.folding import apply_fold, scale_columns
from bitwright.models.sites import Site, find_sites
from bitwright.quantization.hessian_products import product
from bitwright.quantization.products import multiply
from bitwright.quantization.stages import BlockTask

__all__ = [
    "Range",
    "SiteBench",
    "apply_scale",
    "fake_quantize",
    "gram_or_tokens",
    "judged_samples",
    "mean_magnitude",
    "open_bench",
    "refuse_options",
    "scale_weight",
    "task_sites",
]

Range = Literal["restricted", "full", "centred"]


def fake_quantize(
    weight: Tensor,
    scheme: QuantScheme,
    options: FitOptions,
    *,
    dtype: torch.dtype = torch.float32,
    divisor: Tensor | None = None,
) -> Tensor:
    """``weight`` (``[out, in]``, any float dtype) as it comes back from storage, its columns divided by ``divisor``.

    ``divisor`` is float32 ``[in]``; the result, ``dtype`` ``[out, in]``, is computed in float32.
    """
    if scheme.axis == 0 or scheme.scale_scheme is not None:
        rounded = QuantizedTensor.quantize(weight, scheme, options).dequantize()
        return (rounded if divisor is None else rounded.div_(divisor)).to(dtype)
    found = grid.fit(weight, scheme=scheme, options=options)
    codes = grid.encode(weight, parameters=found, scheme=scheme)
    if divisor is None:
        return grid.decode(codes, parameters=found, scheme=scheme, dtype=dtype)
    rounded = use_huge_pages(torch.empty(weight.shape, dtype=dtype, device=weight.device))
    for rows in row_tiles(weight):
        part = Parameters(found.scale[rows], None if found.zero is None else found.zero[rows])
        rounded[rows] = grid.decode(codes[rows], parameters=part, scheme=scheme).div_(divisor)
    return rounded


def scale_weight(weight: Tensor, columns: Tensor | None, rows: Tensor | None = None) -> Tensor:
    """``weight`` (``[out, in]``) times ``columns`` (float32 ``[in]``) over ``rows`` (float32 ``[out]``), in its dtype,
    computed in float32: what a block holds once a scale has been put into it."""
    if columns is None and rows is None:
        return weight
    if (found := native_scaling.scale_weight(weight, columns, rows)) is not None:
        return found
    scaled = use_huge_pages(torch.empty(weight.shape, dtype=weight.dtype, device=weight.device))
    for part in row_tiles(weight):
        tile = weight[part].to(torch.float32)
        tile = tile if columns is None else tile * columns
        scaled[part] = tile if rows is None else tile / rows[part, None]
    return scaled


def refuse_options(task: BlockTask, options: FitOptions) -> None:
    """Look whether every layer's scheme can take the options of the range.

    Raises:
        BitwrightError: BW201 naming the layer, its scheme and the option.
    """
    for name, scheme in task.linears.items():
        if (reason := options.refuse(scheme.weight)) is not None:
            what = f"{scheme.weight.name}, the scheme of {name}, cannot be used: {reason}"
            raise BitwrightError("BW201", what, suggestion="range restricted, or a symmetric integer scheme")


def judged_samples(task: BlockTask, tokens: int) -> tuple[int, ...]:
    """Which calibration samples candidates are judged on: evenly spread, whole, at most ``tokens`` tokens but one."""
    length = max(1, max(_token_count(inputs) for inputs in task.inputs))
    count = max(1, min(len(task.inputs), tokens // length))
    return tuple(number * len(task.inputs) // count for number in range(count))


def _token_count(inputs: Tensor) -> int:
    return inputs.numel() // inputs.shape[-1]


def task_sites(task: BlockTask) -> tuple[Site, ...]:
    """The sites of the task's layers, seen in its longest sample, with verified folds."""
    longest = max(range(len(task.inputs)), key=lambda number: task.inputs[number].numel())
    return find_sites(task.block, task.name, task.layers, partial(task.run, longest))


def mean_magnitude(task: BlockTask, site: Site) -> Tensor:
    """``mean |x|`` of each channel of a site's input over all calibration tokens: ``[in]`` float64."""
    seen = {id(task.statistics[name]): task.statistics[name] for name in site.layers if name in task.statistics}
    tokens = sum(entry.tokens for entry in seen.values())
    total = torch.zeros(site.width, dtype=torch.float64)
    for entry in seen.values():
        total += entry.sum_of_magnitudes.to(total.device)
    return total / max(1, tokens)


@dataclass(frozen=True, slots=True)
class SiteBench:
    """A site with what it read and made on the judged samples, all in memory: one site's activations at a time.

    Attributes:
        layers: the layers to be quantized that saw a token, by full name.
        inputs: what each of them read, ``[tokens, in]``; one tensor where that was one.
        scope: the module whose output is judged.
        calls: how it was called, ``(arguments, keywords)``.
        references: its outputs with float weights.
        judge: of a site with a single layer: its input, or the Gram matrix of it where that is smaller; the error of a
            product needs no more. ``None`` for other sites.
    """

    layers: Mapping[str, nn.Module]
    inputs: Mapping[str, Tensor]
    scope: nn.Module
    calls: tuple[tuple[tuple[Any, ...], Mapping[str, Any]], ...]
    references: tuple[Tensor, ...]
    judge: Tensor | None
    is_gram: bool

    def dtype(self, name: str) -> torch.dtype:
        """In which the weight of a layer is best given to :meth:`loss`: its own where the layer is run with it."""
        return torch.float32 if self.judge is not None else linear_weight(self.layers[name]).dtype

    @torch.no_grad()
    def loss(self, weights: Mapping[str, Tensor]) -> float:
        """Sum of squared errors of what the site makes with ``weights`` (``[out, in]``, by layer)."""
        if self.judge is not None:
            (layer,) = self.layers.values()
            (weight,) = weights.values()
            return self._product_error(weight, linear_weight(layer))
        with _swapped(self.layers, weights):
            found = [_first_tensor(self.scope(*arguments, **keywords)) for arguments, keywords in self.calls]
        return sum(_squares(a.to(torch.float32) - b) for a, b in zip(found, self.references, strict=True))

    def _product_error(self, weight: Tensor, own: Tensor) -> float:
        """``|X D^T|^2`` for ``D = weight - own``; with the Gram matrix ``G = X^T X`` it is ``tr(D G D^T)``."""
        assert self.judge is not None
        difference = torch.empty(weight.shape, dtype=self.judge.dtype, device=weight.device)
        for rows in row_tiles(weight):
            difference[rows] = weight[rows].to(torch.float32) - own[rows].to(torch.float32)
        if self.is_gram:
            return float((product(difference, self.judge) * difference).sum(dtype=torch.float64))
        return _squares(multiply(self.judge, difference).to(torch.float32))


@torch.no_grad()
def open_bench(task: BlockTask, site: Site, samples: Sequence[int]) -> SiteBench | None:
    """Run the judged samples and keep what the site reads and makes; ``None`` if none of their tokens reached it."""
    scope = task.block.get_submodule(site.scope.removeprefix(task.name).removeprefix("."))
    calls: list[tuple[tuple[Any, ...], Mapping[str, Any]]] = []
    seen: dict[str, list[Tensor]] = {}

    def note(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        calls.append((arguments, keywords))

    def read(name: str, arguments: tuple[Tensor, ...]) -> None:
        seen.setdefault(name, []).append(arguments[0].detach().reshape(-1, site.width))

    hooks = [scope.register_forward_pre_hook(note, with_kwargs=True)]
    hooks += [
        task.layers[name].register_forward_pre_hook(lambda _, arguments, name=name: read(name, arguments))
        for name in site.layers
    ]
    try:
        for sample in samples:
            task.run(sample)
    finally:
        for hook in hooks:
            hook.remove()
    inputs = _joined(seen)
    layers = {name: task.layers[name] for name in site.layers if name in inputs}
    if not layers:
        return None
    if site.scope in layers:
        judge, is_gram = gram_or_tokens(inputs[site.scope])
        return SiteBench(layers, inputs, scope, (), (), judge, is_gram)
    references = tuple(_first_tensor(scope(*arguments, **keywords)).to(torch.float32) for arguments, keywords in calls)
    return SiteBench(layers, inputs, scope, tuple(calls), references, None, False)


def gram_or_tokens(tokens: Tensor) -> tuple[Tensor, bool]:
    """``X^T X`` in float32 and true where that is smaller than ``tokens`` ``X`` (``[tokens, in]``), else those."""
    is_gram = tokens.shape[0] > tokens.shape[1]
    if is_gram or tokens.dtype != torch.bfloat16:  # products of other half precisions are slow, and overflow
        tokens = tokens.to(torch.float32)
    return (tokens.t() @ tokens if is_gram else tokens), is_gram


def _joined(seen: Mapping[str, list[Tensor]]) -> dict[str, Tensor]:
    """One tensor for each layer, and the same one for layers that read the same memory."""
    joined: dict[tuple[int, ...], Tensor] = {}
    for parts in seen.values():
        key = tuple(part.data_ptr() for part in parts)
        if key not in joined and any(part.numel() > 0 for part in parts):
            joined[key] = torch.cat(parts)
    keys = {name: tuple(part.data_ptr() for part in parts) for name, parts in seen.items()}
    return {name: joined[key] for name, key in keys.items() if key in joined}


@torch.no_grad()
def apply_scale(
    task: BlockTask, site: Site, scale: Tensor, *, folding: bool, hooks: ExitStack
) -> dict[str, Tensor] | None:
    """Multiply the weights of a site by ``scale`` (``[in]`` float32, columns) and divide what it reads.

    Where the scale cannot be folded the readers' inputs are divided while they run: by hooks of ``hooks``, and by the
    vectors that are returned by layer. ``None``, and nothing changed, where ``folding`` allows no such vector.
    """
    modules = {f"{task.name}.{path}": module for path, module in task.block.named_modules() if path}
    readers = [modules[name] for name in site.readers]
    if site.fold is not None:
        apply_fold(site.fold, modules[site.fold.producer], readers, scale)
        return {}
    if folding:
        warnings.warn(Notice(f"not equalized, since only folds are allowed: {site.refusal}"), stacklevel=2)
        return None
    multiplier = 1.0 / scale
    for name in site.layers:
        scale_columns(task.layers[name], scale)
        hooks.enter_context(_multiplied_input(task.layers[name], multiplier))
    return dict.fromkeys(site.layers, multiplier)


@contextmanager
def _multiplied_input(layer: nn.Module, multiplier: Tensor) -> Iterator[None]:
    def multiply(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        first = arguments[0]
        return ((first.to(torch.float32) * multiplier).to(first.dtype), *arguments[1:])

    hook = layer.register_forward_pre_hook(multiply)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _swapped(layers: Mapping[str, nn.Module], weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Let the layers hold other weights (``[out, in]``) for a while; the old ones come back bit for bit."""
    kept = {name: layer.weight for name, layer in layers.items()}
    try:
        for name, weight in weights.items():
            own = kept[name]
            assert isinstance(own, Tensor)
            stored = weight if isinstance(layers[name], nn.Linear) else weight.t()
            layers[name].weight = nn.Parameter(stored.to(own.dtype), requires_grad=False)
        yield
    finally:
        for name, own in kept.items():
            layers[name].weight = own


def _first_tensor(output: object) -> Tensor:
    found = output[0] if isinstance(output, tuple) else output
    assert isinstance(found, Tensor)
    return found


def _squares(difference: Tensor) -> float:
    return float(difference.square().sum(dtype=torch.float64))
