"""The Hessian of a layer's squared output error, ``H = 2/n sum(x xT)``, damped and factored, once per input site."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.quantization.cholesky import factor_upper
from bitwright.quantization.gptq_order import Order
from bitwright.quantization.statistics import SiteStatistics

__all__ = ["Factor", "factor_hessian", "importance_of"]

STRIP = 1024
LEAST_RAISE = 1e-3  # the first step up from no damping at all


@dataclass(frozen=True, slots=True)
class Factor:
    """``R`` with ``R RT = H + damping``, in the order of rounding.

    Attributes:
        upper: ``[in, in]`` float32, upper triangular; only zero below the diagonal inside its diagonal blocks.
        damp: the fraction of the mean diagonal that was added.
        damping: the number that was added.
        live: ``[in]`` bool, the columns whose input was not always zero; ``None`` if that is all.
    """

    upper: Tensor
    damp: float
    damping: float
    live: Tensor | None


def importance_of(statistics: SiteStatistics) -> Tensor:
    """The diagonal of ``H``: ``[in]`` float32."""
    return (statistics.sum_of_squares * (2 / statistics.tokens)).to(torch.float32)


def factor_hessian(statistics: SiteStatistics, order: Order, damp: float) -> Factor | None:
    """Factor the site's Hessian, with more damping where ``damp`` is not enough; ``None`` if nothing is.

    The result is kept with the statistics, so that layers of one site are factored once.
    """
    key = (order.key, damp)
    if statistics.factored is not None and statistics.factored[0] == key:
        found: Factor | None = statistics.factored[1]
        return found
    statistics.factored = None
    factor = next(filter(None, (_factor(statistics, order, fraction) for fraction in _ladder(damp))), None)
    statistics.factored = (key, factor)
    return factor


def _ladder(damp: float) -> Iterator[float]:
    """``damp``, then ten times as much at each step, up to the mean diagonal itself."""
    yield damp
    while damp < 1:
        damp = min(1.0, max(damp * 10, LEAST_RAISE))
        yield damp


def _factor(statistics: SiteStatistics, order: Order, damp: float) -> Factor | None:
    """Factor with this much damping, or say that it does not work."""
    upper = _ordered(statistics, order)
    diagonal = upper.diagonal()
    live = diagonal > 0
    count = int(live.sum())
    if not count or not torch.isfinite(diagonal).all():
        return None
    mean = float(diagonal.sum(dtype=torch.float64)) / count
    # A dead input has no products with others: any number on its diagonal leaves its weights out of all updates.
    diagonal[~live] = mean
    diagonal += damp * mean
    if not factor_upper(upper):
        return None
    return Factor(upper, damp, damp * mean, None if count == live.numel() else live)


def _ordered(statistics: SiteStatistics, order: Order) -> Tensor:
    """A copy of ``H`` with rows and columns in the order of rounding, right on and above its diagonal."""
    gram = statistics.upper_gram() if order.columns is None else statistics.gram
    assert gram is not None
    ordered = torch.empty_like(gram)
    for start in range(0, gram.shape[0], STRIP):
        strip = slice(start, start + STRIP)
        columns = order.columns
        part = gram[strip, start:] if columns is None else gram[columns[strip]][:, columns[start:]]
        torch.mul(part, 2 / statistics.tokens, out=ordered[strip, start:])
    return ordered
