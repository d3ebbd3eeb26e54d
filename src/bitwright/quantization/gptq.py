"""GPTQ (Frantar et al. 2022): round one column after the other, and let those that follow make up for the error.

What is minimized is the squared error of the layer's output over the calibration tokens, ``tr(D H DT)`` with ``D`` the
change of the weight and ``H = 2/n sum(x xT)``. Rounding to nearest is always tried beside it and kept where its error
is smaller, so the result is never worse than that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.grid import FitOptions
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme
from bitwright.quantization import fp8
from bitwright.quantization.concurrency import map_side_by_side
from bitwright.quantization.gptq_grids import FittedGrids, Fitting, FixedGrids, join, nearest
from bitwright.quantization.gptq_order import Order, arrange
from bitwright.quantization.gptq_solver import output_error, solve
from bitwright.quantization.hessian import Factor, factor_hessian, importance_of
from bitwright.quantization.stages import Rounded, Rounder, Stage
from bitwright.quantization.statistics import SiteStatistics

__all__ = ["GPTQ", "GptqOptions", "round_by_error_feedback"]

SEARCHES = ("none", "plain", "importance", "auto")
OUTPUTS = 512  # outputs whose error is measured at a time, on each thread
PART = 2048  # outputs that are rounded together, at most
SMALL = 1 << 18  # weights that are not worth several threads
TURNED = 16  # outputs turned into columns at a time, so that they stay in cache


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqOptions:
    """How columns are ordered and grouped, how ranges are chosen, how the Hessian is damped.

    Attributes:
        act_order: round the columns with the strongest inputs first; ``None``: yes, unless ``group_aware``. Without
            ``static_groups``, groups are then made of columns that are rounded together, which the file has to say
            (``group_index``).
        group_aware: the same within each group, and groups by their strongest input: groups stay consecutive.
        static_groups: fit all grids to the original weights, before anything is rounded; ``None``: with ``act_order``,
            so that groups stay consecutive. Double quantization does so in any case.
        true_sequential: round the sites of a block one after the other, each on inputs made by rounded predecessors.
        block_size: columns that are rounded before later ones get to know; changes the speed and not the result.
        damp: the fraction of the mean diagonal that is added to the Hessian. Where that does not make it positive
            definite, ten times as much is tried, and so on; a layer for which nothing helps is rounded to nearest.
        range: what symmetric ranges mean, see :class:`bitwright.core.grid.FitOptions`.
        search: try shrunk ranges and keep, per group, the one of least squared error, ``plain`` or with each column
            weighted by the diagonal of the Hessian (``importance``). ``auto`` does the whole layer in all three ways
            and keeps the one of least output error.
        fp8_aware: make every weight an exact e4m3 multiple of one power of two (see :mod:`bitwright.quantization.fp8`).
        strict: fail where the Hessian cannot be factored, instead of rounding to nearest.
    """

    act_order: bool | None = None
    group_aware: bool = False
    static_groups: bool | None = None
    true_sequential: bool = False
    block_size: int = 128
    damp: float = 0.01
    range: Literal["restricted", "full", "centred"] = "restricted"
    search: Literal["none", "plain", "importance", "auto"] = "none"
    fp8_aware: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        FitOptions(symmetric_range=self.range)
        _check("search", self.search, self.search in SEARCHES, ", ".join(SEARCHES))
        is_count = type(self.block_size) is int and self.block_size >= 1
        _check("block_size", self.block_size, is_count, "a positive whole number")
        is_fraction = type(self.damp) in (int, float) and 0 <= self.damp <= 1
        _check("damp", self.damp, is_fraction, "a number from 0 to 1")
        for name in ("group_aware", "true_sequential", "fp8_aware", "strict"):
            _check(name, getattr(self, name), type(getattr(self, name)) is bool, "True or False")
        for name in ("act_order", "static_groups"):
            value = getattr(self, name)
            _check(name, value, value is None or type(value) is bool, "True, False or None")
        one_order = not (self.by_strength and self.group_aware)
        _check("group_aware", self.group_aware, one_order, "False together with act_order: each is an order of its own")

    @property
    def by_strength(self) -> bool:
        """What ``act_order`` comes to."""
        return not self.group_aware if self.act_order is None else self.act_order

    @property
    def fits_first(self) -> bool:
        """What ``static_groups`` comes to."""
        return self.by_strength if self.static_groups is None else self.static_groups

    @property
    def reorders(self) -> bool:
        """Whether groups are not runs of consecutive columns; the plan of a run asks."""
        return self.by_strength and not self.fits_first


@dataclass(frozen=True, slots=True)
class _Problem:
    """What is to be rounded, and for which inputs. ``weight``: ``[out, in]``; ``importance``: the diagonal of H."""

    weight: Tensor
    scheme: QuantScheme
    importance: Tensor
    order: Order
    options: GptqOptions

    @property
    def is_static(self) -> bool:
        return self.options.fits_first or self.scheme.scale_scheme is not None

    def parts(self) -> list[slice]:
        """The outputs, in parts for the threads there are; all of them where groups run across outputs."""
        count, threads = self.weight.shape[0], torch.get_num_threads()
        if self.scheme.axis == 0 and not self.is_static:
            return [slice(0, count)]
        parts = threads * -(-count // (threads * PART)) if count * self.weight.shape[1] > SMALL else 1
        size = -(-count // parts)
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def turn(self, weight: Tensor) -> Tensor:
        """``[outputs, in]`` as ``[in, outputs]`` float32, in the order of rounding: a copy, made in tiles."""
        turned = torch.empty(weight.shape[1], weight.shape[0], dtype=torch.float32, device=weight.device)
        for start in range(0, weight.shape[0], TURNED):
            tile = weight[start : start + TURNED].to(torch.float32)
            tile = tile if self.order.columns is None else tile[:, self.order.columns]
            turned[:, start : start + TURNED] = tile.t()
        return turned


def round_by_error_feedback(
    weight: Tensor, statistics: SiteStatistics | None, scheme: QuantScheme, options: GptqOptions
) -> Rounded:
    """Quantize ``weight`` (``[out, in]``, any float dtype) for the inputs that ``statistics`` (with gram) describe.

    The notes say where more damping than asked for was needed (``damp``), where rounding to nearest was kept
    (``rounded_by``, ``reason``), and what ``auto`` chose (``search``).

    Raises:
        ArgumentError: BW201 for a scheme that ``fp8_aware`` cannot go with.
        BitwrightError: BW401 without calibration tokens; BW602 for weights that are not finite; BW604 if the Hessian
            cannot be factored and ``strict`` is set.
    """
    if statistics is None or not statistics.tokens or not statistics.with_gram:
        raise BitwrightError(
            "BW401",
            "GPTQ has no calibration tokens for this layer",
            why="it minimizes the error on the layer's inputs, and there are none",
            suggestion="give calibration text, or round to nearest: --algorithm rtn",
        )
    if options.fp8_aware:
        fp8.check_scheme(scheme)
    if not torch.isfinite(weight).all():
        suggestion = "fetch the weights again; no scale covers such numbers"
        raise BitwrightError("BW602", "NaN or infinity among the values to quantize", suggestion=suggestion)
    weight = weight.detach()
    scale = fp8.power_scale(weight) if options.fp8_aware else None
    importance = importance_of(statistics)
    order = arrange(
        importance,
        scheme,
        act_order=options.by_strength,
        group_aware=options.group_aware,
        static_groups=options.fits_first or scheme.scale_scheme is not None,
    )
    weight = weight if scale is None else fp8.through_fp8(weight.to(torch.float32), scale)
    problem = _Problem(weight, scheme, importance, order, options)
    fittings = {}
    for search in SEARCHES[:-1] if options.search == "auto" else (options.search,):
        ranges = FitOptions(symmetric_range=options.range, search=search != "none")
        fittings[search] = Fitting(ranges, search == "importance", scale)
    factor = factor_hessian(statistics, order, options.damp)
    if factor is None:
        return _without_factor(problem, next(iter(fittings.values())))
    return _best(problem, factor, fittings)


def _best(problem: _Problem, factor: Factor, fittings: dict[str, Fitting]) -> Rounded:
    """What has the least output error, rounding to nearest included."""
    notes: dict[str, Any] = {} if factor.damp == problem.options.damp else {"damp": factor.damp}
    best: QuantizedTensor | None = None
    least, name = math.inf, ""
    for search, fitting in fittings.items():
        fixed = FixedGrids.fit(problem.weight, problem.scheme, fitting, problem.importance, problem.order)
        solved, error = _solve(problem, factor, fitting, fixed)
        if solved is not None and error < least:
            best, least, name = solved, error, search
        plain = nearest(problem.weight, fixed)
        error = _error_below(problem, plain, factor, least)
        if best is None or error < least:
            best, least, name = plain, error, "rtn"
    assert best is not None
    if name == "rtn":
        notes |= {"rounded_by": "rtn", "reason": "its error on the calibration tokens is smaller"}
    elif problem.options.search == "auto":
        notes["search"] = name
    return Rounded(best, notes)


def _solve(
    problem: _Problem, factor: Factor, fitting: Fitting, fixed: FixedGrids
) -> tuple[QuantizedTensor | None, float]:
    """The weight rounded column by column and its output error; ``None`` if updates grow beyond all numbers.

    Outputs do not know of each other: some are rounded on each thread.
    """
    scheme, order, importance = problem.scheme, problem.order, problem.importance
    count = problem.weight.shape[1] if scheme.axis == 0 else len(order.runs)
    ordered = importance if order.columns is None else importance[order.columns]
    codes = torch.empty(problem.weight.shape, dtype=scheme.code_dtype, device=problem.weight.device)

    def solve_part(outputs: slice) -> tuple[float, FixedGrids | FittedGrids]:
        grids = fixed if problem.is_static else FittedGrids(scheme, fitting, count)
        weight = problem.turn(problem.weight[outputs])
        solved = solve(weight, factor, order, grids, ordered, problem.options.block_size, outputs)
        if order.columns is None:
            codes[outputs] = solved.codes.t()
        else:
            codes[outputs, order.columns] = solved.codes.t()
        return solved.error, grids

    try:
        made = map_side_by_side(solve_part, problem.parts())
    except BitwrightError as error:
        if error.code != "BW602":
            raise
        return None, math.inf
    fitted = [grids.parameters() for _, grids in made if isinstance(grids, FittedGrids)]
    parameters = join(fitted, dim=0) if fitted else None
    stored, zero = fixed.parameters() if parameters is None else (parameters.scale, parameters.zero)
    index = order.group_index
    tensor = QuantizedTensor(scheme=scheme, codes=codes, scale=stored, zero=zero, group_index=index)
    return tensor, sum(error for error, _ in made)


def _error_below(problem: _Problem, tensor: QuantizedTensor, factor: Factor, limit: float) -> float:
    """The output error of ``tensor``, or infinity as soon as that of some outputs alone is beyond ``limit``."""
    is_separable = tensor.scheme.axis == 1 and isinstance(tensor.scale, Tensor)
    whole = None if is_separable else tensor.dequantize()

    def measure(outputs: slice) -> float:
        rounded = tensor.rows(outputs).dequantize() if whole is None else whole[outputs]
        return output_error(problem.turn(problem.weight[outputs] - rounded), factor)

    total, count, together = 0.0, problem.weight.shape[0], torch.get_num_threads()
    parts = [slice(start, min(start + OUTPUTS, count)) for start in range(0, count, OUTPUTS)]
    for first in range(0, len(parts), together):
        total += sum(map_side_by_side(measure, parts[first : first + together]))
        if total > limit:
            return math.inf
    return total


def _without_factor(problem: _Problem, fitting: Fitting) -> Rounded:
    """Round to nearest where the Hessian cannot be factored, or fail if that is what was asked for."""
    reason = "the Hessian is not positive definite, whatever is added to its diagonal"
    if problem.options.strict:
        raise BitwrightError(
            "BW604", reason, why="the layer's inputs were zero in every calibration token, or far too large",
            suggestion="give other calibration text, or leave out --strict to round this layer to nearest",
        )  # fmt: skip
    fixed = FixedGrids.fit(problem.weight, problem.scheme, fitting, problem.importance, problem.order)
    return Rounded(nearest(problem.weight, fixed), {"rounded_by": "rtn", "reason": reason})


def _check(field: str, value: object, is_valid: bool, accepted: str) -> None:
    if not is_valid:
        raise ArgumentError("BW201", f"{field} is {value!r}", suggestion=f"accepted: {accepted}")


def _refuse(scheme: QuantScheme, options: GptqOptions) -> str | None:
    reason = fp8.refuse_scheme(scheme) if options.fp8_aware else None
    return reason or FitOptions(symmetric_range=options.range).refuse(scheme)


GPTQ: Stage[Rounder] = Stage("gptq", GptqOptions, round_by_error_feedback, _refuse)
