"""Native kernels beside torch and the machine's ceilings, in one run: shares and ratios, because bandwidth moves.

    python -m benchmarks.kernels --threads 2 --json benchmarks/results/kernels.json

Decoding (few tokens) is measured in bytes a second against a loop that only reads; prefill (many) in products a second
against a loop that only multiplies. Times are medians, and the least, of several rounds in which all take turns. On a
machine with other work, `--processor-time` (one thread) leaves out what others took.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.command import told_command
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme
from bitwright.core.scheme_names import parse
from bitwright.kernels import _native, native, native_library

SCHEMES = ("w4g128", "w4g128-a8", "w4g32-a8", "w4g32-a8g32", "w8", "w8a8", "w8-a8g32", "nf4g64", "w2g64", "w3g64")
TOKENS = (1, 4, 16, 128, 512)
ROUTES = {"int8": (0, 1024), "bfloat16": (1, 512), "float32": (2, 256)}
Run = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One kernel at one number of tokens. ``share``: of the ceiling that binds it; ``speedup``: over torch's dense
    bfloat16 product of the same shape."""

    kernel: str
    tokens: int
    milliseconds: float
    least_milliseconds: float
    gigabytes_per_second: float
    giga_operations_per_second: float
    share: float
    bound: str
    speedup: float


def measure(runs: dict[str, Run], rounds: int, seconds: float, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds a call of each, taking turns, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    calls: dict[str, int] = {}
    for name, run in runs.items():
        run()
        start = clock()
        run()
        calls[name] = max(1, round(seconds / max(1e-6, clock() - start)))
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            for _ in range(calls[name]):
                run()
            times[name].append((clock() - start) / calls[name])
    return times


def ceilings(threads: int) -> dict[str, Run]:
    """A read of 256 MiB and products without memory, by name."""
    memory = torch.ones(256 << 20, dtype=torch.uint8)
    runs: dict[str, Run] = {"read": lambda: _native.read_memory(memory.data_ptr(), memory.numel(), threads)}
    for name, (route, _) in ROUTES.items():
        runs[name] = lambda route=route: _native.multiply(route, 100_000, threads)  # type: ignore[misc]
    return runs


def random_weight(scheme: LayerScheme, shape: tuple[int, int]) -> QuantizedTensor:
    """Random codes, without the time to round 60 million numbers."""
    weight, (rows, columns) = scheme.weight, shape
    groups = 1 if weight.group is None else -(-columns // weight.group)
    codes = torch.randint(0, 1 << weight.bits, shape, dtype=torch.uint8)
    codes = codes.sub_(-weight.code_min % 256).view(torch.int8) if weight.code == "int" else codes
    scale = torch.rand(rows, groups).add_(0.5).to(weight.scale_dtype)
    return QuantizedTensor(scheme=weight, codes=codes, scale=scale)


def kernel_runs(shape: tuple[int, int], tokens: int) -> tuple[dict[str, Run], dict[str, int]]:
    """What is compared at one number of tokens, and the bytes of each one's weight."""
    x = torch.randn(tokens, shape[1]).to(torch.bfloat16)
    dense = torch.randn(shape).to(torch.bfloat16)
    runs: dict[str, Run] = {"torch bfloat16": lambda: functional.linear(x, dense)}
    sizes = {"torch bfloat16": dense.numel() * 2}
    for name in SCHEMES:
        scheme = parse(name)
        packed = native.pack(random_weight(scheme, shape), scheme)
        runs[name] = lambda packed=packed: native.run(x, packed, None)  # type: ignore[misc]
        sizes[name] = sum(_size(part) for part in packed.tensors.values())
    return runs, sizes


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def route_of(name: str) -> str:
    """Which products a kernel is made of."""
    if name.startswith("torch"):
        return "bfloat16"
    scheme = parse(name)
    return "int8" if scheme.activation is not None else "float32" if scheme.weight.is_codebook else "bfloat16"


def rows_of(
    shape: tuple[int, int], tokens: int, times: dict[str, list[float]], sizes: dict[str, int], threads: int
) -> list[Row]:
    """Figures of one number of tokens, from times that hold the ceilings too."""
    read = (256 << 20) / min(times["read"])
    rows = []
    for name, size in sizes.items():
        products = 2 * ROUTES[route_of(name)][1] * 100_000 * threads / min(times[route_of(name)])
        least, operations = min(times[name]), 2 * tokens * shape[0] * shape[1]
        floors = {"memory": size / read, route_of(name): operations / products}
        bound = max(floors, key=lambda key: floors[key])
        rows.append(
            Row(
                kernel=name,
                tokens=tokens,
                milliseconds=statistics.median(times[name]) * 1e3,
                least_milliseconds=least * 1e3,
                gigabytes_per_second=size / least / 1e9,
                giga_operations_per_second=operations / least / 1e9,
                share=floors[bound] / least,
                bound=bound,
                speedup=min(times["torch bfloat16"]) / least,
            )
        )
    return rows


def render(rows: list[Row], ceiling: dict[str, float]) -> str:
    lines = ["ceilings: " + ", ".join(f"{name} {value:.0f}" for name, value in ceiling.items()), ""]
    lines.append("| kernel | tokens | ms (median) | ms (least) | GB/s | GOP/s | share of | over torch bf16 |")
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        lines.append(
            f"| {row.kernel} | {row.tokens} | {row.milliseconds:.3f} | {row.least_milliseconds:.3f} "
            f"| {row.gigabytes_per_second:.1f} | {row.giga_operations_per_second:.0f} "
            f"| {row.share:.0%} {row.bound} | {row.speedup:.2f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="4096x14336")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.05, help="of each kernel in each round")
    parser.add_argument("--processor-time", action="store_true", help="count the processor's time; one thread")
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows_count, columns = map(int, args.shape.split("x"))
    shape = (rows_count, columns)
    if args.processor_time and args.threads != 1:
        parser.error("--processor-time needs --threads 1")
    clock = time.thread_time if args.processor_time else time.perf_counter
    torch.set_num_threads(args.threads)
    rows: list[Row] = []
    best: dict[str, float] = {}
    for tokens in args.tokens:
        runs, sizes = kernel_runs(shape, tokens)
        times = measure(ceilings(args.threads) | runs, args.rounds, args.seconds, clock)
        rows += rows_of(shape, tokens, times, sizes, args.threads)
        best["read GB/s"] = max(best.get("read GB/s", 0.0), (256 << 20) / min(times["read"]) / 1e9)
        for name, (_, per_round) in ROUTES.items():
            found = 2 * per_round * 100_000 * args.threads / min(times[name]) / 1e9
            best[f"{name} GOP/s"] = max(best.get(f"{name} GOP/s", 0.0), found)
    print(render(rows, best))
    if args.json:
        record = {
            "command": told_command("benchmarks.kernels"),
            "processor": platform.processor() or platform.machine(),
            "instruction_set": native_library.instruction_set(),
            "load_average": os.getloadavg()[0],
            "torch": torch.__version__,
            "ceilings": best,
            "rows": [asdict(row) for row in rows],
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
