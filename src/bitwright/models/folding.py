"""Folding a per-channel scale of a layer's input into what produces that input, without changing the float model.

The readers' columns are multiplied by the scale and the producer's output is divided by it: the weight and bias of a
norm, or the rows of the linear before (values to output projection, up to down projection).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from bitwright.models.blocks import linear_weight

__all__ = ["Fold", "apply_fold", "holds", "is_norm", "norm_offset", "scale_columns", "share_scale"]

EXACT = {torch.float64: 1e-9, torch.float32: 1e-5}  # how equal outputs must be; others: 1e-3
ROUNDED = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 1e-2}  # where 1 + weight is rounded; others: 3e-2


@dataclass(frozen=True, slots=True, kw_only=True)
class Fold:
    """What makes a site's input.

    Attributes:
        producer: full name of the norm or linear layer.
        kind: which of the two.
        rows: ``[in]``, the output channel of the producer that makes each input channel. Query heads that share a
            key-value head share its rows, and then their scales must be the same.
        offset: of a norm that multiplies by ``offset + weight``: 0, or 1 as Gemma's do.
    """

    producer: str
    kind: Literal["norm", "linear"]
    rows: Tensor
    offset: int = 0


def is_norm(module: nn.Module) -> bool:
    """Whether the module may be a norm: no children, a vector for a weight, and perhaps one for a bias."""
    names = {name for name, _ in module.named_parameters(recurse=False)}
    weight = getattr(module, "weight", None)
    return names in ({"weight"}, {"weight", "bias"}) and isinstance(weight, Tensor) and weight.dim() == 1


@torch.no_grad()
def norm_offset(module: nn.Module, sample: Tensor) -> int | None:
    """0 if the output of a norm is proportional to its weight, 1 if to one plus its weight, ``None`` if to neither.

    Found by halving and by running the module on ``sample`` (``[..., width]``), whatever its class is called.
    """
    weight, bias = getattr(module, "weight"), getattr(module, "bias", None)  # noqa: B009 - not typed as a tensor
    before = module(sample).to(torch.float32)
    saved = {parameter: parameter.detach().clone() for parameter in (weight, bias) if parameter is not None}
    try:
        for offset in (0, 1):
            weight.copy_((weight.to(torch.float32) + offset) / 2 - offset)
            if bias is not None:
                bias.div_(2)
            if _is_equal(module(sample).to(torch.float32) * 2, before, ROUNDED.get(weight.dtype, 3e-2)):
                return offset
            for parameter, values in saved.items():
                parameter.copy_(values)
        return None
    finally:
        for parameter, values in saved.items():
            parameter.copy_(values)


def share_scale(fold: Fold | None, vector: Tensor) -> Tensor:
    """``vector`` (``[in]``) with its mean over the channels that one row of the producer makes."""
    if fold is None or fold.kind == "norm":
        return vector
    rows = fold.rows.to(vector.device)
    size = int(rows.max()) + 1
    total = torch.zeros(size, dtype=vector.dtype, device=vector.device).index_add_(0, rows, vector)
    count = torch.zeros(size, dtype=vector.dtype, device=vector.device).index_add_(0, rows, torch.ones_like(vector))
    return (total / count.clamp(min=1))[rows]


@torch.no_grad()
def apply_fold(fold: Fold, producer: nn.Module, readers: Sequence[nn.Module], scale: Tensor) -> Tensor:
    """Divide the producer's output by ``scale`` (``[in]`` float32, positive) and multiply the readers' columns by it.

    In place. Channels whose scale is 1 keep every bit. Returns the scale that was really applied: a norm's new weight
    is rounded to its dtype, and the columns make up for that.
    """
    scale = scale.to(next(producer.parameters()).device)
    if fold.kind == "norm":
        scale = _divide_norm(producer, fold.offset, scale)
    else:
        _divide_rows(producer, fold.rows, scale)
    for reader in readers:
        scale_columns(reader, scale)
    return scale


@torch.no_grad()
def scale_columns(layer: nn.Module, scale: Tensor) -> None:
    """Multiply the columns of a Linear's or Conv1D's weight by ``scale`` (``[in]`` float32), in place."""
    weight = linear_weight(layer)
    weight.copy_(weight.to(torch.float32) * scale.to(weight.device))


@torch.no_grad()
def holds(
    block: nn.Module,
    name: str,
    folds: Sequence[tuple[Fold, Sequence[str]]],
    run: Callable[[], Tensor],
    expected: Tensor,
) -> bool:
    """Whether ``folds`` (each with the names of its readers) leave the block's output alone; the block is left as is.

    They are tried together with random powers of two, which make no rounding error of their own.
    """
    generator = torch.Generator().manual_seed(0)
    modules = {f"{name}.{path}": module for path, module in block.named_modules() if path}
    touched = {modules[each] for fold, readers in folds for each in (fold.producer, *readers)}
    with _restored(touched):
        for fold, readers in folds:
            size = int(fold.rows.max()) + 1
            powers = 2.0 ** torch.randint(-1, 2, (size,), generator=generator).to(torch.float32)
            scale = powers[fold.rows].to(fold.rows.device)
            apply_fold(fold, modules[fold.producer], [modules[reader] for reader in readers], scale)
        found = run()
    rounded = any(fold.offset for fold, _ in folds)
    limits: Mapping[torch.dtype, float] = ROUNDED if rounded else EXACT
    return _is_equal(found, expected, limits.get(expected.dtype, 3e-2 if rounded else 1e-3))


@contextmanager
def _restored(modules: set[nn.Module]) -> Iterator[None]:
    """Put every number of the modules' own parameters back at the end."""
    saved = [
        (parameter, parameter.detach().clone()) for module in modules for parameter in module.parameters(recurse=False)
    ]
    try:
        yield
    finally:
        for parameter, values in saved:
            parameter.copy_(values)


def _divide_norm(norm: nn.Module, offset: int, scale: Tensor) -> Tensor:
    weight, bias = getattr(norm, "weight"), getattr(norm, "bias", None)  # noqa: B009 - not typed as a tensor
    before = weight.to(torch.float32) + offset
    divided = (before / scale - offset).to(weight.dtype)
    after = divided.to(torch.float32) + offset
    # A weight of zero stays zero whatever divides it; so does one that its dtype rounds to zero, which would lose it.
    lost = (after == 0) != (before == 0)
    applied = torch.where((before == 0) | lost, scale, before / torch.where(after == 0, 1.0, after))
    applied = torch.where((scale == 1) | lost | ~torch.isfinite(applied), 1.0, applied)
    weight.copy_(torch.where(applied == 1, weight, divided))
    if bias is not None:
        bias.copy_(torch.where(applied == 1, bias, (bias.to(torch.float32) / applied).to(bias.dtype)))
    return applied


def _divide_rows(layer: nn.Module, rows: Tensor, scale: Tensor) -> None:
    weight, bias = linear_weight(layer), getattr(layer, "bias", None)
    by_row = torch.ones(weight.shape[0], dtype=torch.float32, device=weight.device)
    by_row[rows.to(weight.device)] = scale
    weight.copy_(weight.to(torch.float32) / by_row[:, None])
    if isinstance(bias, Tensor):
        bias.copy_(bias.to(torch.float32) / by_row)


def _is_equal(found: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Whether every channel (last dimension) agrees in its root mean square; a few huge channels must not hide others.

    A channel that is nearly always zero is measured by the typical one.
    """
    channels = expected.reshape(-1, expected.shape[-1]).to(torch.float32)
    error = (found.reshape(channels.shape).to(torch.float32) - channels).square().mean(0).sqrt()
    size = channels.square().mean(0).sqrt()
    typical = size.median()
    return bool(torch.isfinite(error).all() and (error <= tolerance * (size + 0.01 * typical)).all())
