"""In which order GPTQ rounds the columns of a weight, and which of them share a grid."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.core.scheme import QuantScheme

__all__ = ["Order", "Run", "arrange"]


@dataclass(frozen=True, slots=True)
class Run:
    """Places ``start`` to ``end`` in the order of rounding, whose columns lie in group ``number``."""

    start: int
    end: int
    number: int


@dataclass(frozen=True, slots=True)
class Order:
    """How the columns are gone through.

    Attributes:
        key: says whether two orders over one Hessian are the same.
        columns: ``[in]`` int64, the column at each place, or ``None`` where nothing is moved.
        runs: the groups as they come, one after the other, without a gap.
        group_index: ``[in]`` int32, the group of each column, where groups are not runs of consecutive columns.
    """

    key: tuple[str, int]
    columns: Tensor | None
    runs: tuple[Run, ...]
    group_index: Tensor | None = None


def arrange(
    importance: Tensor, scheme: QuantScheme, *, act_order: bool, group_aware: bool, static_groups: bool
) -> Order:
    """The order of the columns of a weight.

    Args:
        importance: ``[in]``, the diagonal of the Hessian.
        act_order: the most important columns first, whichever group they lie in. Groups are then made of columns that
            are rounded together, unless ``static_groups`` (or per channel grids) make that unnecessary.
        group_aware: the most important columns of a group first, and the group with the most important column first:
            groups stay what they are in the file.
    """
    width = importance.shape[0]
    size = width if scheme.group is None or scheme.axis == 0 else min(scheme.group, width)
    starts = range(0, width, size)
    if group_aware:
        leaders = torch.stack([importance[start : start + size].max() for start in starts])
        numbers = leaders.argsort(descending=True, stable=True).tolist()
        columns, runs, place = [], [], 0
        for number in numbers:
            part = importance[number * size : (number + 1) * size]
            columns.append(number * size + part.argsort(descending=True, stable=True))
            runs.append(Run(place, place + part.shape[0], number))
            place += part.shape[0]
        return Order(("group_aware", size), torch.cat(columns), tuple(runs))
    runs = [Run(start, min(start + size, width), number) for number, start in enumerate(starts)]
    if not act_order:
        return Order(("natural", 0), None, tuple(runs))
    columns_by_importance = importance.argsort(descending=True, stable=True)
    index = None
    if not static_groups and len(runs) > 1:
        index = torch.empty(width, dtype=torch.int32, device=importance.device)
        index[columns_by_importance] = (torch.arange(width, device=importance.device) // size).to(torch.int32)
    return Order(("act_order", 0), columns_by_importance, tuple(runs), index)
