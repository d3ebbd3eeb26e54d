"""Which launches are fastest on this GPU: rows for ``src/bitwright/kernels/gpu/tuned.json``."""

from __future__ import annotations

import time
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.gpu_runs.shapes import packed
from benchmarks.gpu_runs.timing import Bench, Section
from bitwright.kernels.gpu import linear
from bitwright.kernels.gpu.launch import LinearLaunch

__all__ = ["tune_linear"]

SHAPE = (4096, 4096)
BOUNDS = (1, 16, 64, 512)
SPACE = {
    1: ((32, 64, 128), (16,), (2, 4, 8, 16), (4,), (2, 3, 4)),
    16: ((32, 64, 128), (16,), (2, 4, 8), (4,), (3,)),
    64: ((64, 128), (32, 64), (1, 2, 4), (4, 8), (3,)),
    512: ((64, 128), (64, 128), (1,), (4, 8), (2, 3)),
}


def tune_linear(bench: Bench) -> tuple[Section, list[dict[str, Any]]]:
    """The fastest launch of w4g128 for some numbers of rows, and the rows of the table that say so."""
    section = bench.begin("tuning of w4g128 4096 x 4096", ("rows", "best", "us", "tried", "failed"))
    found: list[dict[str, Any]] = []
    weight = packed("w4g128", (bench.size(SHAPE[0], 32), bench.size(SHAPE[1], 64)), bench.device)
    nbytes = sum(tensor.nbytes for tensor in weight.tensors.values())
    copies = [packed("w4g128", weight.shape, bench.device) for _ in range(bench.copies(nbytes))]
    for rows in BOUNDS[: bench.size(9, 1)]:
        if time.monotonic() > bench.deadline:
            section.notes.append(f"out of time before {rows} rows")
            break
        x = torch.randn(rows, weight.shape[1], device=bench.device).to(bench.dtype)
        times: dict[LinearLaunch, float] = {}
        failed = 0
        for block_n, block_m, split, warps, stages in list(product(*SPACE[rows]))[: bench.size(99, 2)]:
            chosen = LinearLaunch(block_n=block_n, block_m=block_m, split=split, warps=warps, stages=stages)
            calls = [partial(linear.multiply, x, one, chosen=chosen) for one in copies]
            try:
                times[chosen] = bench.seconds(calls, least=0.005, rounds=3)
            except Exception as error:  # too much shared memory, say: not a candidate
                failed += 1
                section.notes.append(f"{chosen}: {str(error)[:100]}")
        if not times:
            continue
        best = min(times, key=times.__getitem__)
        fields = {"block_n": best.block_n, "block_m": best.block_m, "warps": best.warps, "stages": best.stages}
        bound = rows if rows != BOUNDS[-1] else 1_000_000_000
        found.append({"rows": bound, **fields, **({"split": best.split} if rows <= 16 else {})})
        section.add(rows, str(fields | {"split": best.split}), f"{1e6 * times[best]:.1f}", len(times), failed)
    return section, found
