"""Decoding after long contexts, with keys and values as they are and in 8 and 4 bits, beside llama.cpp's.

    python -m benchmarks.decode_context --work-dir WORK --peers-dir PEERS --json benchmarks/results/decode_context.json

One sequence after 2k, 8k and 32k tokens, on both sides with weights of as many bits and the cache as the row says; of
llama.cpp with flash attention, without which it has no 4-bit values. The first 512 tokens of a context are computed,
the rest are copies of their keys and values: what they are changes no time. Both sides are processes of their own that
take turns; figures are medians.

    python -m benchmarks.decode_context --fit

How many tokens, and sequences of 2048, fit in 4 GiB of cache by what the engine plans, and whether a cache of that size
takes that much memory when it is made and filled.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from benchmarks.command import told_command
from benchmarks.decode import DRIVERS, HEADS, Engine, prepare
from benchmarks.decode_peers.driving import memory
from benchmarks.shapes import SHAPES, Shape
from bitwright.core.kv_scheme import parse_kv
from bitwright.core.memory import trim_memory
from bitwright.models.paged_cache import PAGE, CacheShape, PagedCache

CONTEXTS = (2048, 8192, 32768)
STEPS = 8
SPARE = 64  # tokens of a cache behind the longest context
CACHES = {"none": "f16", "int8": "q8_0", "int4": "q4_0", "int4-rotated": "q4_0"}  # ours, and llama.cpp's of that size
ROOM, SEQUENCE = 4 << 30, 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Tokens a second of one sequence after ``context`` tokens, and how many times as fast they are as others."""

    shape: str
    scheme: str
    threads: int
    context: int
    cache: str
    ours: float
    theirs: float
    over_theirs: float
    over_float: float
    problem: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What ``ROOM`` bytes hold: by plan, and how much memory a cache of that many pages was seen to take."""

    shape: str
    cache: str
    tokens: int
    sequences: int
    over_float: float
    planned_bytes: int
    taken_bytes: int


def engines(args: argparse.Namespace, name: str, scheme: str, threads: int) -> dict[tuple[str, str], Engine]:
    """By whose it is and its cache; only one of llama.cpp for each of its types."""
    files = prepare(args.work_dir, args.peers_dir, ["llama-cpp"], name, scheme)
    path = os.pathsep.join([str(DRIVERS.parent.parent / "src"), os.environ.get("PYTHONPATH", "")])
    settings = {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    room = str(max(args.contexts) + SPARE)
    found = {}
    for cache in args.caches:
        ours = [str(DRIVERS / "bitwright_driver.py"), str(files["bitwright"]), str(threads), HEADS[scheme]]
        ours += ["--kv", cache, "--tokens", room, "--kept", str(args.work_dir / "kept")]
        found["ours", cache] = Engine(name=cache, command=[sys.executable, *ours], environment=settings)
    python = args.peers_dir / "llama-cpp" / "bin" / "python"
    for cache in {CACHES[cache]: None for cache in args.caches}:
        theirs = [str(python), str(DRIVERS / "llama_cpp_driver.py"), str(files["llama-cpp"]), str(threads), cache, room]
        found["theirs", cache] = Engine(name=cache, command=theirs, environment=settings)
        if not python.exists() or not files["llama-cpp"].exists():
            found["theirs", cache].problem = "not installed, or its model could not be made"
    return found


def measure(args: argparse.Namespace, name: str, scheme: str, threads: int) -> list[Row]:
    members = engines(args, name, scheme, threads)
    for engine in members.values():
        if not engine.problem:
            engine.open()
    for _ in range(args.rounds):
        for context in args.contexts:
            for engine in members.values():
                engine.measure(f"context {context} {STEPS}")
    for engine in members.values():
        engine.close()
    rows = []
    for context in args.contexts:
        rates = {key: _rate(engine, context) for key, engine in members.items()}
        for cache in args.caches:
            ours, theirs = rates["ours", cache], rates["theirs", CACHES[cache]]
            problems = (members["ours", cache].problem, members["theirs", CACHES[cache]].problem)
            rows.append(
                Row(
                    shape=name, scheme=scheme, threads=threads, context=context, cache=cache, ours=ours,
                    theirs=theirs, over_theirs=ours / theirs if theirs else 0.0,
                    over_float=ours / rates["ours", "none"] if rates.get(("ours", "none")) else 0.0,
                    problem="; ".join(filter(None, problems)),
                )
            )  # fmt: skip
    return rows


def _rate(engine: Engine, context: int) -> float:
    seconds = engine.seconds.get(f"context {context} {STEPS}")
    return STEPS / statistics.median(seconds) if seconds else 0.0


def fits(name: str, shape: Shape, caches: list[str]) -> list[Fit]:
    """What fits by the planner, with a cache of each scheme made and filled in turn."""
    sizes = CacheShape(layers=shape.blocks, kv_heads=shape.kv_heads, head_dim=shape.head_dim, dtype=torch.bfloat16)
    rows: list[Fit] = []
    for cache in caches:
        page = PagedCache(sizes, 1, parse_kv(cache)).page_bytes()
        pages = ROOM // page
        rows.append(
            Fit(
                shape=name, cache=cache, tokens=pages * PAGE, sequences=pages * PAGE // SEQUENCE,
                over_float=pages * PAGE / rows[0].tokens if rows else 1.0, planned_bytes=page * pages,
                taken_bytes=_taken(sizes, pages, cache),
            )
        )  # fmt: skip
    return rows


def _taken(sizes: CacheShape, pages: int, cache: str) -> int:
    trim_memory()  # what the cache before has left in the heap would be taken for a part of this one
    before = memory()[1]
    made = PagedCache(sizes, pages, parse_kv(cache))
    every = (made.keys, made.values, made.key_codes, made.value_codes, made.key_scale, made.value_scale)
    for tensors in every:
        for tensor in tensors:
            tensor.fill_(1)
    return memory()[1] - before


def render(rows: list[Row] | list[Fit]) -> str:
    records = [asdict(row) for row in rows]
    lines = ["| " + " | ".join(records[0]) + " |", "|---" * len(records[0]) + "|"]
    for record in records:
        cells = (f"{value:.2f}" if isinstance(value, float) else str(value) for value in record.values())
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path)
    parser.add_argument("--peers-dir", type=Path, default=Path("peers"))
    parser.add_argument("--fit", action="store_true", help="what fits in 4 GiB of cache, instead of speeds")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--scheme", choices=HEADS, default="w4g32-a8")
    parser.add_argument("--threads", nargs="*", type=int, default=[2, 1])
    parser.add_argument("--contexts", nargs="*", type=int, default=list(CONTEXTS))
    parser.add_argument("--caches", nargs="*", choices=CACHES, default=list(CACHES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.work_dir is None and not args.fit:
        parser.error("--work-dir is needed, but for --fit")
    return args


def main() -> None:
    args = read_arguments()
    found: list[dict[str, object]] = []
    for name in args.shapes:
        for threads in args.threads[:1] if args.fit else args.threads:
            rows = fits(name, SHAPES[name], args.caches) if args.fit else measure(args, name, args.scheme, threads)
            print(render(rows), flush=True)
            found += map(asdict, rows)
    if args.json:
        record = {
            "command": told_command("benchmarks.decode_context"),
            "load_average": os.getloadavg()[0],
            "rows": found,
        }
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
