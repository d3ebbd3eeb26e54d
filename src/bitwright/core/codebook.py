"""The levels of the non-uniform code kinds: four-bit tables with a largest level of 1, and fp8 e4m3 as it is."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["FP8_MAX", "decode_levels", "encode_levels", "levels"]

# QLoRA (Dettmers et al. 2023), appendix E: quantiles of the normal distribution, an exact zero.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# OCP Microscaling Formats v1.0, E2M1: the code is sign, two exponent bits, one mantissa bit.
E2M1 = tuple(sign * value / 6 for sign in (1, -1) for value in (0, 0.5, 1, 1.5, 2, 3, 4, 6))
# The four-bit float of bitsandbytes, in its own code order.
BNB_FP4 = tuple(sign * value / 12 for sign in (1, -1) for value in (0, 0.0625, 8, 12, 4, 6, 2, 3))
TABLES = {"nf4": NF4, "fp4_e2m1": E2M1, "fp4_bnb": BNB_FP4}
FP8_MAX = 448.0  # the largest finite value of float8 e4m3


@cache
def levels(code: str) -> Tensor:
    """The 16 levels of a four-bit kind, float32, indexed by code."""
    return torch.tensor(TABLES[code], dtype=torch.float32)


@cache
def _levels_there(code: str, device: torch.device) -> Tensor:
    return levels(code).to(device)


@cache
def _ascending(code: str) -> tuple[int, tuple[tuple[float, int], ...]]:
    """The code of the lowest level, then each midpoint between neighbours and the step (mod 256) to the next code."""
    order = sorted({value: index for index, value in reversed(list(enumerate(TABLES[code])))}.items())
    steps = [
        (float(torch.tensor((low + high) / 2, dtype=torch.float32)), (above - below) % 256)
        for (low, below), (high, above) in pairwise(order)
    ]
    return order[0][1], tuple(steps)


def encode_levels(values: Tensor, code: str) -> Tensor:
    """Codes (uint8) of the nearest levels to ``values`` (float32, divided by their scale); a midpoint goes down."""
    if code == "fp8_e4m3":
        return values.clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
    lowest, steps = _ascending(code)
    codes = torch.full(values.shape, lowest, dtype=torch.uint8, device=values.device)
    for midpoint, step in steps:  # fifteen comparisons are many times faster than a search per number
        codes.add_((values > midpoint).view(torch.uint8), alpha=step)
    return codes


def decode_levels(codes: Tensor, code: str) -> Tensor:
    """The levels (float32) of ``codes`` (uint8)."""
    if code == "fp8_e4m3":
        return codes.view(torch.float8_e4m3fn).to(torch.float32)
    return _levels_there(code, codes.device)[codes.long()]
