"""8-bit activations: integer products summed exactly, scaled once a group.

A token is quantized by itself (symmetric int8, one scale, or one for each group of its input features), so its result
does not depend on its neighbours. Integer zero points are taken off in integers; a float one is split into the nearest
code, taken off in integers too, and a remainder that multiplies the sum of the token's codes. Sums run over the columns
that share a scale of the weight and one of the token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from bitwright.core import grid
from bitwright.core.grid import Parameters
from bitwright.core.scheme import QuantScheme

__all__ = ["Segments", "Tokens", "multiply", "quantize_tokens", "segments"]

# |token code| <= 127 and |weight code| <= 128: 1024 products stay below 2^24, where float32 is exact in any order.
# Less its zero point |weight code| <= 255: 65,536 products stay below 2^31.
EXACT_FLOAT32 = 1024
EXACT_INT32 = 1 << 16
BATCH = 512  # tokens worked on at a time, so that their sums stay in cache


@dataclass(frozen=True, slots=True)
class Tokens:
    """Quantized activations: ``codes`` int8 ``[tokens, in]`` and ``scale`` float32 ``[tokens, groups]``.

    ``group``: how many input features share a scale; ``None``: all, and there is one group.
    """

    codes: Tensor
    scale: Tensor
    group: int | None = None

    def batches(self) -> Iterator[tuple[slice, Tokens]]:
        """Some tokens at a time, and which."""
        for start in range(0, self.codes.shape[0], BATCH):
            rows = slice(start, start + BATCH)
            yield rows, Tokens(self.codes[rows], self.scale[rows], self.group)


@dataclass(frozen=True, slots=True)
class Segments:
    """Which columns share a scale: ``(group, first, last)`` of each run, after ``order`` brought groups together."""

    runs: tuple[tuple[int, int, int], ...]
    order: Tensor | None


def quantize_tokens(x: Tensor, scheme: QuantScheme) -> Tokens:
    """Quantize each row of ``x`` (``[tokens, in]``, at least one), or each group of a row, by its own largest absolute
    value.

    Raises:
        BitwrightError: BW602 if a value is not finite.
    """
    parameters = grid.fit(x, scheme=scheme)
    return Tokens(grid.encode(x, parameters=parameters, scheme=scheme), parameters.scale, scheme.group)


def segments(
    columns: int, group: int | None, group_index: Tensor | None, activation_group: int | None = None
) -> Segments:
    """The runs of columns of one group (and one of the activations'), none longer than int32 sums allow.

    ``activation_group`` and ``group`` are multiples of each other, and there is no ``group_index`` beside it.
    """
    if activation_group is not None and (group is None or activation_group < group):
        size = columns if group is None else group
        bounds = [
            (first // size, first, min(first + activation_group, columns))
            for first in range(0, columns, activation_group)
        ]
        order = None
    elif group_index is None:
        size = columns if group is None else group
        bounds = [(number, first, min(first + size, columns)) for number, first in enumerate(range(0, columns, size))]
        order = None
    else:
        order = torch.argsort(group_index, stable=True)
        ends = torch.bincount(group_index).cumsum(0).tolist()
        bounds = list(zip(range(len(ends)), [0, *ends[:-1]], ends, strict=True))
    runs = [
        (number, start, min(start + EXACT_INT32, last))
        for number, first, last in bounds
        for start in range(first, last, EXACT_INT32)
    ]
    return Segments(tuple(runs), order)


def multiply(tokens: Tokens, codes: Tensor, parameters: Parameters, columns: Segments, scheme: QuantScheme) -> Tensor:
    """Tokens times some weight rows: float32 ``[tokens, rows]``.

    ``codes`` is ``[rows, in]`` in the scheme's code dtype; ``parameters`` holds ``[rows, groups]`` tensors. Sums of
    groups are added in order, each step its own operation: a fused one would round a row by where it lies in a batch.
    With groups of activations, y = sum over segments of ((products - zero part) * scale) * token scale; without, the
    token's scale multiplies the whole sum.
    """
    weight, shift = _signed(codes if columns.order is None else codes[:, columns.order], scheme)
    scale = parameters.scale.to(torch.float32)
    nearest, remainder = _split(parameters.zero, shift, scheme)
    total = torch.empty(tokens.codes.shape[0], codes.shape[0], dtype=torch.float32, device=codes.device)
    for rows, batch in tokens.batches():
        left = batch.codes if columns.order is None else batch.codes[:, columns.order]
        sums = torch.zeros_like(total[rows])
        for group, first, last in columns.runs:
            run = left[:, first:last]
            products = _integer_products(run, weight[:, first:last])
            if nearest is not None:
                token_sums = run.sum(1, keepdim=True, dtype=torch.int32)
                products.sub_(token_sums * nearest[:, group])
                corrected = products.to(torch.float32)
                corrected = corrected if remainder is None else corrected.sub_(token_sums * remainder[:, group])
            else:
                corrected = products.to(torch.float32)
            corrected.mul_(scale[:, group])
            if batch.group is not None:
                corrected.mul_(batch.scale[:, first // batch.group, None])
            sums.add_(corrected)
        total[rows] = sums if batch.group is not None else sums.mul_(batch.scale)
    return total


def _signed(codes: Tensor, scheme: QuantScheme) -> tuple[Tensor, int]:
    """Weight codes as int8, and what has been taken off them."""
    if scheme.code == "int":
        if scheme.bits > 1 or not scheme.symmetric:
            return codes, 0
        one = torch.ones(codes.shape[0], 1, device=codes.device)
        levels = grid.decode(codes, parameters=Parameters(one, None), scheme=replace(scheme, group=None))  # -1 and 1
        return levels.to(torch.int8), 0
    if scheme.bits < 8:
        return codes.view(torch.int8), 0
    return (codes ^ 0x80).view(torch.int8), 128


def _split(zero: Tensor | None, shift: int, scheme: QuantScheme) -> tuple[Tensor | None, Tensor | None]:
    """Zero points less ``shift``, as the nearest whole number (int32) and what remains (float32), if anything can."""
    if zero is None:
        return None, None
    if scheme.zero == "integer":
        return zero.to(torch.int32) - shift, None
    exact = zero.to(torch.float32)
    nearest = exact.round().clamp(scheme.code_min, scheme.code_max)
    return nearest.to(torch.int32) - shift, exact - nearest


def _integer_products(left: Tensor, right: Tensor) -> Tensor:
    """``left [tokens, n]`` times ``right [rows, n]`` transposed, int8 both: exact int32 ``[tokens, rows]``."""
    if left.shape[1] == 1:  # torch 2.13's own product reads a single column with the strides of a row
        return left.to(torch.int32) * right.t().to(torch.int32)
    if left.device.type == "cpu" and _native_product_is_exact():
        return torch._int_mm(left, right.t())
    sums = torch.zeros(left.shape[0], right.shape[0], dtype=torch.int32, device=left.device)
    for first in range(0, left.shape[1], EXACT_FLOAT32):
        columns = slice(first, first + EXACT_FLOAT32)
        sums.add_((left[:, columns].to(torch.float32) @ right[:, columns].to(torch.float32).t()).to(torch.int32))
    return sums


@cache
def _native_product_is_exact() -> bool:
    """Whether torch has an int8 product and this processor's does not saturate (16-bit sums of pairs can)."""
    extremes = torch.tensor([[127], [-127]], dtype=torch.int8).expand(2, 64).contiguous()
    weights = torch.tensor([[127], [-128]], dtype=torch.int8).expand(2, 64).contiguous()
    try:
        products = torch._int_mm(extremes, weights.t())
    except (AttributeError, RuntimeError):
        return False
    return torch.equal(products.to(torch.int64), extremes.to(torch.int64) @ weights.to(torch.int64).t())
