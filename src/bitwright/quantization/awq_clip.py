"""AWQ's second half: for each group of weights, the range whose clipping costs its layer's output least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bitwright.core.grid import FitOptions
from bitwright.core.scheme import QuantScheme
from bitwright.quantization.smoothing import fake_quantize, gram_or_tokens

__all__ = ["CLIP_RATIOS", "apply_ratios", "search_ratios"]

CLIP_RATIOS = tuple(1.0 - 0.05 * step for step in range(10))  # of the largest weight; 1 first: equals do not clip


@torch.no_grad()
def search_ratios(weight: Tensor, tokens: Tensor, scheme: QuantScheme, options: FitOptions) -> Tensor:
    """The share of its range that each group of ``weight`` (``[out, in]``) keeps, ``[rows, groups]`` along the axis.

    The loss of a group is the squared error of its own part of the output, ``sum_tokens (x_g . (w_g - w'_g))^2``, for
    the inputs ``tokens`` (``[tokens, in]``).
    """
    judges = [gram_or_tokens(tokens[:, columns]) for columns in _columns(weight.shape[1], scheme)]
    power = tokens.to(torch.float32).square().sum(0)
    ratios, least = torch.ones(0), torch.ones(0)
    for ratio in CLIP_RATIOS:
        clipped = apply_ratios(weight.clone(), torch.full((), ratio, dtype=torch.float32, device=weight.device), scheme)
        difference = fake_quantize(clipped, scheme, options) - weight.to(torch.float32)
        errors = _group_errors(difference, judges, power, scheme)
        if ratio == 1.0:
            ratios, least = torch.ones_like(errors), errors
            continue
        better = errors < least
        ratios, least = torch.where(better, ratio, ratios), torch.where(better, errors, least)
    return ratios


@torch.no_grad()
def apply_ratios(weight: Tensor, ratios: Tensor, scheme: QuantScheme) -> Tensor:
    """Clamp each group of ``weight`` (``[out, in]``, in place) to its ratio of its own least and greatest value."""
    rows = weight if scheme.axis == 1 else weight.t()
    for number, columns in enumerate(_columns(rows.shape[1], scheme, along=1)):
        part = rows[:, columns]
        ratio = (ratios if ratios.dim() == 0 else ratios[:, number : number + 1]).to(part.dtype)
        low, high = part.amin(1, keepdim=True), part.amax(1, keepdim=True)
        # Where nothing is clipped no bit changes; a range away from zero shrinks towards zero alone.
        rows[:, columns] = part.clamp(min=low.where(low > 0, low * ratio), max=high.where(high < 0, high * ratio))
    return weight


def _columns(size: int, scheme: QuantScheme, along: int | None = None) -> Iterator[slice]:
    """The groups along a dimension of ``size``; for axis 0 the input columns are no groups, and there is one."""
    group = size if scheme.group is None or (along is None and scheme.axis == 0) else scheme.group
    for start in range(0, size, max(1, group)):
        yield slice(start, min(start + group, size))


def _group_errors(
    difference: Tensor, judges: Sequence[tuple[Tensor, bool]], power: Tensor, scheme: QuantScheme
) -> Tensor:
    if scheme.axis == 0:  # a group holds one input channel for several outputs, whose errors are apart
        squares = (difference.square() * power).t()
        groups = [squares[:, columns].sum(1) for columns in _columns(squares.shape[1], scheme, along=1)]
        return torch.stack(groups, dim=1)
    errors = []
    for (judge, is_gram), columns in zip(judges, _columns(difference.shape[1], scheme), strict=True):
        part = difference[:, columns]
        product = (part @ judge) * part if is_gram else (part.to(judge.dtype) @ judge.t()).to(part.dtype).square()
        errors.append(product.sum(1))
    return torch.stack(errors, dim=1)
