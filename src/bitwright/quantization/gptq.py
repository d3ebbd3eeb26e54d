"""GPTQ (Frantar et al. 2022): round one column after the other, and let those that follow make up for the error.

What is minimized is the squared error of the layer's output over the calibration tokens, ``tr(D H DT)`` with ``D`` the
change of the weight and ``H = 2/n sum(x xT)``. Rounding to nearest is always tried beside it and kept where its error
is smaller, so the result is never worse than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.grid import FitOptions
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme
from bitwright.quantization import fp8
from bitwright.quantization.gptq_grids import FittedGrids, Fitting, FixedGrids, nearest
from bitwright.quantization.gptq_order import Order, arrange
from bitwright.quantization.gptq_solver import output_error, solve
from bitwright.quantization.hessian import Factor, factor_hessian, importance_of
from bitwright.quantization.stages import Rounded, Rounder, Stage
from bitwright.quantization.statistics import SiteStatistics

__all__ = ["GPTQ", "GptqOptions", "round_by_error_feedback"]

SEARCHES = ("none", "plain", "importance", "auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class GptqOptions:
    """How columns are ordered and grouped, how ranges are chosen, how the Hessian is damped.

    Attributes:
        act_order: round the columns with the strongest inputs first. Groups are then made of columns that are rounded
            together, which the file has to say (``group_index``), unless ``static_groups`` are set.
        group_aware: the same within each group, and groups by their strongest input: groups stay consecutive.
        static_groups: fit all grids to the original weights, before anything is rounded. Double quantization does so
            in any case.
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

    act_order: bool = False
    group_aware: bool = False
    static_groups: bool = False
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
        for name in ("act_order", "group_aware", "static_groups", "true_sequential", "fp8_aware", "strict"):
            _check(name, getattr(self, name), type(getattr(self, name)) is bool, "True or False")
        one_order = not (self.act_order and self.group_aware)
        _check("group_aware", self.group_aware, one_order, "False together with act_order: each is an order of its own")

    @property
    def reorders(self) -> bool:
        """Whether groups are not runs of consecutive columns; the plan of a run asks."""
        return self.act_order and not self.static_groups


@dataclass(frozen=True, slots=True)
class _Candidate:
    tensor: QuantizedTensor
    error: float
    name: str


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
        raise BitwrightError("BW602", "NaN or infinity among the values to quantize")
    values = weight.detach().to(torch.float32)
    scale = fp8.power_scale(values) if options.fp8_aware else None
    values = values if scale is None else fp8.through_fp8(values, scale)
    importance = importance_of(statistics)
    order = arrange(
        importance,
        scheme,
        act_order=options.act_order,
        group_aware=options.group_aware,
        static_groups=options.static_groups or scheme.scale_scheme is not None,
    )
    factor = factor_hessian(statistics, order, options.damp)
    searches = SEARCHES[:-1] if options.search == "auto" else (options.search,)
    fittings = {}
    for search in searches:
        ranges = FitOptions(symmetric_range=options.range, search=search != "none")
        fittings[search] = Fitting(ranges, search == "importance", scale)
    if factor is None:
        return _without_factor(values, scheme, importance, next(iter(fittings.values())), options)
    return _best(values, scheme, importance, order, factor, fittings, options)


def _best(
    weight: Tensor,
    scheme: QuantScheme,
    importance: Tensor,
    order: Order,
    factor: Factor,
    fittings: dict[str, Fitting],
    options: GptqOptions,
) -> Rounded:
    """The candidate of least output error, rounding to nearest among them."""
    notes: dict[str, Any] = {} if factor.damp == options.damp else {"damp": factor.damp}
    best: _Candidate | None = None
    for search, fitting in fittings.items():
        fixed = FixedGrids.fit(weight, scheme, fitting, importance, order)
        plain = nearest(weight, fixed)
        change = _rows(weight - plain.dequantize(), order)
        candidates = [_Candidate(plain, output_error(change, factor), "rtn")]
        del change
        solved = _solve(weight, scheme, importance, order, factor, fitting, fixed, options)
        candidates = candidates if solved is None else [_Candidate(*solved, search), *candidates]
        best = min([*([best] if best is not None else []), *candidates], key=lambda candidate: candidate.error)
    assert best is not None
    if best.name == "rtn":
        notes |= {"rounded_by": "rtn", "reason": "its error on the calibration tokens is smaller"}
    elif options.search == "auto":
        notes["search"] = best.name
    return Rounded(best.tensor, notes)


def _solve(
    weight: Tensor,
    scheme: QuantScheme,
    importance: Tensor,
    order: Order,
    factor: Factor,
    fitting: Fitting,
    fixed: FixedGrids,
    options: GptqOptions,
) -> tuple[QuantizedTensor, float] | None:
    """The weight rounded column by column and its output error; ``None`` if updates grow beyond all numbers."""
    is_static = options.static_groups or scheme.scale_scheme is not None
    count = weight.shape[1] if scheme.axis == 0 else len(order.runs)
    grids = fixed if is_static else FittedGrids(scheme, fitting, count)
    ordered = importance if order.columns is None else importance[order.columns]
    try:
        solved = solve(_rows(weight, order), factor, order, grids, ordered, options.block_size)
    except BitwrightError as error:
        if error.code != "BW602":
            raise
        return None
    codes = torch.empty(weight.shape, dtype=scheme.code_dtype)
    if order.columns is None:
        codes.copy_(solved.codes.t())
    else:
        codes[:, order.columns] = solved.codes.t()
    stored, zero = grids.parameters()
    index = order.group_index
    tensor = QuantizedTensor(scheme=scheme, codes=codes, scale=stored, zero=zero, group_index=index)
    return tensor, solved.error


def _without_factor(
    weight: Tensor, scheme: QuantScheme, importance: Tensor, fitting: Fitting, options: GptqOptions
) -> Rounded:
    """Round to nearest where the Hessian cannot be factored, or fail if that is what was asked for."""
    reason = "the Hessian is not positive definite, whatever is added to its diagonal"
    if options.strict:
        raise BitwrightError(
            "BW604", reason, why="the layer's inputs were zero in every calibration token, or far too large",
            suggestion="give other calibration text, or leave out --strict to round this layer to nearest",
        )  # fmt: skip
    natural = arrange(importance, scheme, act_order=False, group_aware=False, static_groups=True)
    plain = nearest(weight, FixedGrids.fit(weight, scheme, fitting, importance, natural))
    return Rounded(plain, {"rounded_by": "rtn", "reason": reason})


def _rows(weight: Tensor, order: Order) -> Tensor:
    """``weight`` (``[out, in]``) as ``[in, out]`` in the order of rounding: a copy."""
    return weight.t().contiguous() if order.columns is None else weight.t()[order.columns].contiguous()


def _check(field: str, value: object, is_valid: bool, accepted: str) -> None:
    if not is_valid:
        raise ArgumentError("BW201", f"{field} is {value!r}", suggestion=f"accepted: {accepted}")


GPTQ: Stage[Rounder] = Stage("gptq", GptqOptions, round_by_error_feedback)
