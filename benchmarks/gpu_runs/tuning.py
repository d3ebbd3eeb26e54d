"""Which launches are fastest on this GPU: rows for ``src/bitwright/kernels/gpu/tuned.json``."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import product
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.gpu_runs.caches import HEAD_DIM, HEADS, KV_HEADS, random_side
from benchmarks.gpu_runs.shapes import packed
from benchmarks.gpu_runs.timing import Bench, Section
from bitwright.core.kv_scheme import parse_kv
from bitwright.core.scheme_names import parse
from bitwright.kernels.gpu import attention, fp8, integer, launch, library, linear
from bitwright.kernels.gpu.launch import AttentionLaunch, LinearLaunch
from bitwright.kernels.gpu.tokens import quantize_tokens
from bitwright.kernels.records import KernelSpec, PackedWeight

__all__ = ["SECONDS", "complete_rows", "tune_attention", "tune_products"]

Launch = TypeVar("Launch", LinearLaunch, AttentionLaunch)
SECONDS = {"linear": 60, "attention": 25, "integer": 40, "fp8": 30}  # that each may take at most
SCHEMES = {"linear": "w4g128", "integer": "w4g128-a8", "fp8": "fp8-afp8"}
SHAPES = {"narrow": (4096, 4096), "wide": (14336, 4096)}
BOUNDS = (1, 16, 64, 512)
SPLIT_ROWS = 16  # up to so many, rows of the table tell the split; beyond, it follows from the sizes
ENDLESS = 1_000_000_000
SPACE: dict[int, tuple[Sequence[int], ...]] = {
    1: ((32, 64, 128), (16,), (1, 2, 4, 8, 16), (4,), (2, 3, 4)),
    16: ((32, 64, 128), (16,), (1, 2, 4, 8), (4,), (3,)),
    64: ((64, 128), (32, 64), (1, 2, 4), (4, 8), (3,)),
    512: ((64, 128), (64, 128), (1,), (4, 8), (2, 3)),
}
TILES = ((64, 32), (4, 8), (2, 1, 3))  # tokens of keys, warps, stages
COLUMNS = ("rows", "of", "best", "us", "tried", "failed")


def complete_rows(kernel: str, found: list[dict[str, Any]], facts: library.GpuFacts) -> list[dict[str, Any]]:
    """``found``, in the order of their rows, and for more rows than were searched what the table has already."""
    most = max((row["rows"] for row in found), default=0)
    rest = [row for row in launch.rows_of(kernel, facts) if row["rows"] > most]
    return [*sorted(found, key=lambda row: int(row["rows"])), *rest]


def tune_products(bench: Bench, kernel: str) -> tuple[Section, list[dict[str, Any]]]:
    """The fastest launches of one kernel's products for some numbers of rows, of narrow and wide weights, and the rows
    of the table that say so."""
    scheme = SCHEMES[kernel]
    section = bench.begin(f"tuning of {kernel}: {scheme}", COLUMNS)
    facts = library.describe(bench.device)
    rows_found: dict[int, dict[str, Any]] = {}
    spec = KernelSpec(scheme=parse(scheme), shape=SHAPES["narrow"], device=bench.device)
    reason = None if bench.is_dry or kernel != "fp8" else fp8.refuse(spec)
    cases = [] if reason else list(product(BOUNDS[: bench.size(9, 1)], SHAPES))
    for rows, kind in bench.within(section, cases):
        shape = SHAPES[kind] if not bench.is_dry else (32, 64)
        weight = packed(scheme, shape, bench.device)
        nbytes = sum(tensor.nbytes for tensor in weight.tensors.values())
        copies = [weight, *(packed(scheme, shape, bench.device) for _ in range(bench.copies(nbytes) - 1))]
        multiply = _multiplying(kernel, torch.randn(rows, shape[1], device=bench.device).to(bench.dtype), weight)
        names = ("block_n", "block_m", "split", "warps", "stages")
        candidates = [LinearLaunch(**dict(zip(names, each, strict=True))) for each in product(*SPACE[rows])]
        best = _fastest(bench, section, (rows, kind), candidates[: bench.size(999, 2)],
                        partial(_calls, multiply, copies))  # fmt: skip
        if best is not None:
            fields = asdict(best)
            if rows > SPLIT_ROWS:
                del fields["split"]
            row = rows_found.setdefault(rows, {"rows": ENDLESS if rows == BOUNDS[-1] else rows, **fields})
            if kind != next(iter(SHAPES)):
                row[kind] = fields
    if reason:
        section.notes.append(reason)
    return section, complete_rows(kernel, list(rows_found.values()), facts)


def _multiplying(kernel: str, x: Tensor, weight: PackedWeight) -> Callable[[PackedWeight, LinearLaunch], Tensor]:
    """The product alone, of activations that are coded already."""
    if kernel == "linear":
        return lambda one, chosen: linear.multiply(x, one, chosen=chosen)
    if kernel == "integer":
        tokens = quantize_tokens(x, integer.token_layout(weight))
        return lambda one, chosen: integer.multiply(tokens, one, None, x.dtype, chosen=chosen)
    coded = fp8.fp8_tokens(x, -(-x.shape[1] // fp8.STEP) * fp8.STEP)
    return lambda one, chosen: fp8.multiply(coded, one, None, x.dtype, chosen=chosen)


def _calls(
    multiply: Callable[[PackedWeight, LinearLaunch], Tensor], copies: Sequence[PackedWeight], one: LinearLaunch
) -> list[Callable[[], Tensor]]:
    return [partial(multiply, copy, one) for copy in copies]


def tune_attention(bench: Bench) -> tuple[Section, list[dict[str, Any]]]:
    """The same of attention: blocks of a few rows (decoding) and of many (prompts), by bits of the cache."""
    section = bench.begin("tuning of attention", COLUMNS)
    rows_found: dict[int, dict[str, Any]] = {}
    bounds = {attention.FEW_QUERIES: 1, ENDLESS: bench.size(1024, 20)}  # new tokens
    candidates = [AttentionLaunch(tile=tile, warps=warps, stages=stages) for tile, warps, stages in product(*TILES)]
    for bound, name in bench.within(section, product(bounds, ("int8", "none", "int4")[: bench.size(9, 2)])):
        calls = _attending(bench, name, bench.size(8192, 70), bounds[bound])
        best = _fastest(bench, section, (bound, name), candidates[: bench.size(99, 2)], calls)
        if best is not None:
            row = rows_found.setdefault(bound, {"rows": bound, **asdict(best)})
            if name != "int8":
                row[f"bits{parse_kv(name).key.bits if name != 'none' else 16}"] = asdict(best)
    return section, complete_rows("attention", list(rows_found.values()), library.describe(bench.device))


def _attending(
    bench: Bench, name: str, length: int, new: int
) -> Callable[[AttentionLaunch], Iterable[Callable[[], Any]]]:
    """Calls of attention of ``new`` tokens at the end of a context, on several caches."""
    code, device, pages = parse_kv(name).key, bench.device, -(-length // 32)
    heads, width = bench.size(HEADS, 2), bench.size(HEAD_DIM, 32)
    blocks, rows = attention.arrange([0, new], heads // bench.size(KV_HEADS, 1))
    held, starts, lengths = (
        torch.tensor(each, dtype=torch.int32, device=device) for each in (blocks, [0, new], [length])
    )
    table = torch.randperm(pages, device=device).view(1, pages).to(torch.int32)
    batch = attention.AttentionBatch(held, starts, lengths, table, rows, length)
    q = torch.randn(new, heads, width, device=device).to(bench.dtype)
    sides = [(random_side(bench, code, pages), random_side(bench, code, pages)) for _ in range(bench.size(4, 1))]
    return lambda one: [partial(attention.attend, q, *each, batch, chosen=one) for each in sides]


def _fastest(bench: Bench, section: Section, what: tuple[int, str], candidates: Sequence[Launch],
             calls: Callable[[Launch], Iterable[Callable[[], Any]]]) -> Launch | None:  # fmt: skip
    """The candidate that takes the least time, of those that work and that there is time for."""
    times: dict[Launch, float] = {}
    failed = 0
    for one in candidates:
        if time.monotonic() > min(bench.deadline, bench.section_deadline):
            section.notes.append(f"out of time at {what}: {len(candidates) - len(times) - failed} not tried")
            break
        try:
            times[one] = bench.seconds(list(calls(one)), least=0.005, rounds=3)
        except Exception as error:  # too much shared memory, say: not a candidate
            failed += 1
            section.notes.append(f"{one}: {str(error)[:100]}")
    best = min(times, key=times.__getitem__) if times else None
    micro = f"{1e6 * times[best]:.1f}" if best else ""
    section.add(*what, str(asdict(best)) if best else "none", micro, len(times), failed)
    return best
