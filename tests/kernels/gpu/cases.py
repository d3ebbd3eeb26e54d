"""Launches of every kind, at the sizes of real layers: what is compiled ahead of time for each generation of GPUs."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse
from bitwright.kernels.gpu import linear

__all__ = ["CASES"]

OUT, IN = 512, 2048


def a16(scheme: str, rows: int, dtype: torch.dtype = torch.float16, *, expanded: bool = False) -> Callable[[], None]:
    def work() -> None:
        layer = parse(scheme)
        weight = linear.pack(QuantizedTensor.quantize(torch.randn(OUT, IN), layer.weight), layer)
        if expanded:
            linear.expand(weight, 0, OUT, dtype)
        else:
            linear.multiply(torch.zeros(rows, IN, dtype=dtype), weight)

    return work


CASES: dict[str, Callable[[], None]] = {
    "w4g128 rows 1": a16("w4g128", 1),
    "w4g128 bf16 rows 1": a16("w4g128", 1, torch.bfloat16),
    "w4g128 bf16 rows 64": a16("w4g128", 64, torch.bfloat16),
    "w4g128 rows 200": a16("w4g128", 200),
    "w4g32-asym rows 1": a16("w4g32-asym", 1),
    "A16W4 rows 4": a16("A16W4", 4),
    "A16W8 rows 1": a16("A16W8", 1),
    "w8 bf16 rows 1": a16("w8", 1, torch.bfloat16),
    "w3g64 rows 1": a16("w3g64", 1),
    "w2g64 rows 1": a16("w2g64", 1),
    "nf4g64 rows 1": a16("nf4g64", 1),
    "w4g128 float32 rows 1": a16("w4g128", 1, torch.float32),
    "w4g128 expanded": a16("w4g128", 1, expanded=True),
    "fp8 expanded": a16("fp8", 1, torch.float16, expanded=True),
}
