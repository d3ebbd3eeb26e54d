"""GPTQ written again from its paper: one column at a time, everything in float64, the inverse in three steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bitwright.core import grid
from bitwright.core.grid import FitOptions, Parameters
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme
from bitwright.quantization.gptq import GptqOptions
from bitwright.quantization.statistics import SiteStatistics
from tests.core.restatement import code_values

__all__ = ["correlated_site", "hessian", "restate", "squared_error", "textbook_factor"]


def correlated_site(
    width: int,
    *,
    tokens: int = 400,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    gram: bool = True,
    dead: Sequence[int] = (),
) -> SiteStatistics:
    """Statistics of inputs with a mean, strong and weak channels, correlations between them, and ``dead`` channels."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(width, generator=generator) * 3 + 0.02
    mixture = torch.randn(width, width, generator=generator) / width**0.5
    mean = torch.randn(width, generator=generator) * 0.3
    statistics = SiteStatistics(width, with_gram=gram)
    noise = torch.randn(tokens, width, generator=generator)
    inputs = ((noise * strength) @ mixture + mean).to(dtype)
    inputs[:, list(dead)] = 0
    statistics.add(inputs)
    return statistics


def hessian(statistics: SiteStatistics) -> np.ndarray:
    assert statistics.gram is not None
    return statistics.gram.double().numpy() * 2 / statistics.tokens


def squared_error(weight: Tensor, rounded: Tensor, matrix: np.ndarray) -> float:
    """``tr(D H DT)``."""
    change = weight.double().numpy() - rounded.double().numpy()
    return float(((change @ matrix) * change).sum())


def textbook_factor(matrix: np.ndarray) -> np.ndarray:
    """``U`` with ``H^-1 = UT U``, in the three steps of the paper's code: factor, invert, factor."""
    lower = torch.linalg.cholesky(torch.from_numpy(matrix))
    return torch.linalg.cholesky(torch.cholesky_inverse(lower), upper=True).numpy()


@dataclass(frozen=True)
class _Grid:
    """Levels of one column: ``[out, codes]``, which codes they are, and which are odd multiples of the scale."""

    levels: np.ndarray
    codes: np.ndarray
    is_odd: np.ndarray

    def nearest(self, column: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A weight in the middle between two codes takes the even multiple of the scale."""
        distance = np.abs(self.levels - column[:, None])
        ties = distance == distance.min(1, keepdims=True)
        best = np.where(ties, self.is_odd, 2).argmin(1)
        rows = np.arange(column.shape[0])
        return self.codes[best], self.levels[rows, best]


def restate(
    weight: Tensor, statistics: SiteStatistics, scheme: QuantScheme, options: GptqOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and what they stand for, ``[out, in]`` in the original order of columns."""
    matrix, width = hessian(statistics), weight.shape[1]
    importance = matrix.diagonal().copy()
    dead = importance == 0
    matrix[dead, dead] = importance[~dead].mean()
    matrix[np.arange(width), np.arange(width)] += options.damp * importance[~dead].mean()
    order, group_of_place = _order(importance, scheme, options)
    factor = textbook_factor(matrix[np.ix_(order, order)])
    power = 2.0 ** np.ceil(np.log2(float(weight.abs().max()) / 224)) if options.fp8_aware else None
    start = weight.float() if power is None else (weight.float() / power).to(torch.float8_e4m3fn).float() * power
    updated = start.double().numpy()[:, order]
    by_strength = not options.group_aware if options.act_order is None else options.act_order
    static = by_strength if options.static_groups is None else options.static_groups
    static = static or scheme.scale_scheme is not None
    fixed = _fixed_grids(start, scheme, options, importance, power) if static else None
    codes, values = np.zeros(weight.shape, dtype=np.int64), np.zeros(weight.shape)
    grids: dict[int, _Grid] = {}
    for place, column in enumerate(order):
        group = group_of_place[place]
        if fixed is not None:
            here = fixed[column]
        elif scheme.axis == 0:
            here = _fit(updated[:, [place]].T, replace(scheme, axis=1), options, None, power)[0]
        else:
            if group not in grids:
                places = [other for other in range(width) if group_of_place[other] == group]
                weights = importance[[order[other] for other in places]]
                whole = replace(scheme, group=None)
                grids[group] = _fit(updated[:, places], whole, options, weights, power)[0]
            here = grids[group]
        codes[:, column], values[:, column] = here.nearest(updated[:, place])
        error = (updated[:, place] - values[:, column]) / factor[place, place]
        updated[:, place + 1 :] -= np.outer(error, factor[place, place + 1 :])
    return codes, values


def _order(importance: np.ndarray, scheme: QuantScheme, options: GptqOptions) -> tuple[list[int], list[int]]:
    """The columns in order of rounding, and the group at each place."""
    width = importance.shape[0]
    size = width if scheme.group is None or scheme.axis == 0 else scheme.group
    natural = list(range(width))
    if options.act_order or (options.act_order is None and not options.group_aware):
        order = sorted(natural, key=lambda column: -importance[column])
        return order, [place // size for place in natural]
    if options.group_aware:
        groups = [natural[start : start + size] for start in range(0, width, size)]
        groups = [sorted(group, key=lambda column: -importance[column]) for group in groups]
        groups.sort(key=lambda group: -importance[group[0]])
        order = [column for group in groups for column in group]
        return order, [column // size for column in order]
    return natural, [column // size for column in natural]


def _fit(
    values: np.ndarray, scheme: QuantScheme, options: GptqOptions, importance: np.ndarray | None, power: float | None
) -> list[_Grid]:
    """Grids of all columns of ``values`` (``[rows, columns]``), the rows' own; along axis 0 of a turned matrix."""
    tensor = torch.from_numpy(values).float()
    ranges = FitOptions(symmetric_range=options.range, search=options.search != "none")
    weights = (
        torch.from_numpy(importance).float() if options.search == "importance" and importance is not None else None
    )
    parameters = grid.fit(tensor, scheme=scheme, options=ranges, importance=weights)
    if power is not None:
        parameters = _powers_of_two(values, parameters, scheme, power)
    if scheme.scale_scheme is not None:
        stored = QuantizedTensor.quantize(parameters.scale.float().reshape(1, -1), scheme.scale_scheme)
        parameters = grid.rescale(parameters, stored.dequantize().view_as(parameters.scale), scheme)
    size = values.shape[1] if scheme.group is None else scheme.group
    if values.shape[0] == 1 and scheme.group is not None:  # one column, turned: its numbers have grids of their own
        return [_stack([_levels(parameters, scheme, 0, row // size, power) for row in range(values.shape[1])])]
    rows = range(values.shape[0])
    return [
        _stack([_levels(parameters, scheme, row, column // size, power) for row in rows])
        for column in range(values.shape[1])
    ]


def _fixed_grids(
    weight: Tensor, scheme: QuantScheme, options: GptqOptions, importance: np.ndarray, power: float | None
) -> list[_Grid]:
    values = weight.double().numpy()
    if scheme.axis == 1:
        return _fit(values, scheme, options, importance, power)
    assert scheme.scale_scheme is None
    turned = replace(scheme, axis=1)
    return [_fit(values[:, [column]].T, turned, options, None, power)[0] for column in range(values.shape[1])]


def _levels(
    parameters: Parameters, scheme: QuantScheme, row: int, group: int, power: float | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    codes, worth = code_values(scheme)
    zero = 0.0 if parameters.zero is None else float(parameters.zero[row, group])
    is_odd = np.zeros(codes.shape) if scheme.is_codebook or scheme.zero == "float" else (worth - zero) % 2
    levels = (worth - zero) * float(parameters.scale[row, group])
    if power is not None:
        levels = np.where(np.abs(levels) <= 224 * power, levels, np.inf)
    return codes, levels, is_odd


def _stack(rows: list[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> _Grid:
    return _Grid(np.stack([row[1] for row in rows]), rows[0][0], np.stack([row[2] for row in rows]))


def _powers_of_two(values: np.ndarray, parameters: Parameters, scheme: QuantScheme, power: float) -> Parameters:
    """Per group, the power of two beside the fitted scale of less squared error; the upper one if they tie."""
    scale = parameters.scale.double().numpy().copy()
    zero = None if parameters.zero is None else parameters.zero.clone()
    size = values.shape[1] if scheme.group is None else scheme.group
    for row, group in np.ndindex(scale.shape):
        part = values[row, group * size : (group + 1) * size]
        exponent = np.log2(scale[row, group])
        best = np.inf
        for candidate in {2.0 ** np.ceil(exponent): 0, 2.0 ** np.floor(exponent): 0}:
            step = min(max(candidate, power / 512), 32 * power)
            point = 0.0
            if zero is not None:
                low = (scheme.code_min - float(parameters.zero[row, group])) * scale[row, group]
                point = np.clip(scheme.code_min + np.round(-low / step), scheme.code_min, scheme.code_max)
            codes = np.clip(np.round(part / step) + point, scheme.code_min, scheme.code_max)
            error = float((((codes - point) * step - part) ** 2).sum())
            if error < best:
                best, kept, kept_zero = error, step, point
        scale[row, group] = kept
        if zero is not None:
            zero[row, group] = int(kept_zero)
    return Parameters(torch.from_numpy(scale).float(), zero)
