"""8-bit activations: integer products summed exactly, scaled once a group.

A token is quantized by itself (symmetric int8, one scale), so its result does not depend on its neighbours. Weight
codes are counted from their zero point: exactly for integer ones; a float zero point is split into the nearest code,
subtracted exactly, and a remainder that multiplies the sum of the token's codes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.core import grid
from bitwright.core.grid import Parameters
from bitwright.core.scheme import QuantScheme

__all__ = ["Segments", "Tokens", "multiply", "quantize_tokens", "segments"]

# |token code| <= 127 and |weight code - zero| <= 255: 512 products stay below 2^24, where float32 is exact in any
# order, and 65,536 stay below 2^31.
EXACT_FLOAT32 = 512
EXACT_INT32 = 1 << 16


@dataclass(frozen=True, slots=True)
class Tokens:
    """Quantized activations: ``codes`` ``[tokens, in]`` (whole numbers in float32) and ``scale`` ``[tokens, 1]``."""

    codes: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True)
class Segments:
    """Which columns share a scale: ``(group, first, last)`` of each run, after ``order`` brought groups together."""

    runs: tuple[tuple[int, int, int], ...]
    order: Tensor | None


def quantize_tokens(x: Tensor, scheme: QuantScheme) -> Tokens:
    """Quantize each row of ``x`` (``[tokens, in]``) by its own largest absolute value.

    Raises:
        BitwrightError: BW602 if a value is not finite.
    """
    parameters = grid.fit(x, scheme=scheme)
    codes = grid.encode(x, parameters=parameters, scheme=scheme)
    return Tokens(codes.to(torch.float32), parameters.scale)


def segments(columns: int, group: int | None, group_index: Tensor | None) -> Segments:
    """The runs of columns of one group, none longer than int32 sums allow."""
    if group_index is None:
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


def multiply(
    tokens: Tokens, codes: Tensor, parameters: Parameters, columns: Segments, scheme: QuantScheme
) -> Tensor:
    """Tokens times some weight rows: float32 ``[tokens, rows]``.

    ``codes`` is ``[rows, in]`` in the scheme's code dtype; ``parameters`` holds ``[rows, groups]`` tensors. Sums of
    groups are added in order, each step its own operation: a fused one would round a row by where it lies in a batch.
    """
    left = tokens.codes if columns.order is None else tokens.codes[:, columns.order]
    right = codes if columns.order is None else codes[:, columns.order]
    scale = parameters.scale.to(torch.float32)
    total = torch.zeros(left.shape[0], codes.shape[0], dtype=torch.float32, device=codes.device)
    for group, first, last in columns.runs:
        zero = None if parameters.zero is None else parameters.zero[:, group : group + 1]
        nearest, remainder = _split(zero, scheme)
        whole = grid.decode(
            right[:, first:last],
            parameters=Parameters(torch.ones_like(scale[:, :1]), nearest),
            scheme=replace(scheme, group=None, scale_scheme=None),
        )
        products = _integer_sums(left[:, first:last], whole)
        if remainder is not None:
            token_sums = left[:, first:last].sum(1, keepdim=True, dtype=torch.float64).to(torch.float32)
            products.sub_(token_sums * remainder.t())
        total.add_(products.mul_(scale[:, group]))
    return total.mul_(tokens.scale)


def _split(zero: Tensor | None, scheme: QuantScheme) -> tuple[Tensor | None, Tensor | None]:
    """A zero point ``[rows, 1]`` as the nearest code and what remains, if anything can."""
    if zero is None or scheme.zero == "integer":
        return zero, None
    exact = zero.to(torch.float32)
    nearest = exact.round().clamp(scheme.code_min, scheme.code_max)
    return nearest, exact - nearest


def _integer_sums(left: Tensor, right: Tensor) -> Tensor:
    """``left [tokens, n]`` times ``right [rows, n]`` transposed, whole numbers all: exact sums, as float32."""
    if left.shape[1] <= EXACT_FLOAT32:
        return left @ right.t()
    sums = torch.zeros(left.shape[0], right.shape[0], dtype=torch.int32, device=left.device)
    for first in range(0, left.shape[1], EXACT_FLOAT32):
        columns = slice(first, first + EXACT_FLOAT32)
        sums.add_((left[:, columns] @ right[:, columns].t()).to(torch.int32))
    return sums.to(torch.float32)
