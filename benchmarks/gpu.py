"""The GPU path in one run of at most ten minutes: ceilings, products, attention, whole models, memory, quantizing.

    python -m benchmarks.gpu --json benchmarks/results/gpu.json
    TRITON_INTERPRET=1 python -m benchmarks.gpu --dry-run      # every path once, on a CPU, at tiny sizes

Times are medians, of work recorded in CUDA graphs, over operands too many for the caches. Ratios are to the vendor's
bf16 product of the same run; errors are against float64 on the numbers stored. Tables come last. A section that fails
says why, and the others go on; one that would begin too late is left out and named.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.gpu_runs.caches import measure_attention, measure_writing
from benchmarks.gpu_runs.decoding import measure_decoding, measure_memory
from benchmarks.gpu_runs.products import (
    measure_ceilings,
    measure_few_rows,
    measure_many_rows,
    measure_other_schemes,
)
from benchmarks.gpu_runs.rounding import measure_rounding
from benchmarks.gpu_runs.timing import Bench, Section
from benchmarks.gpu_runs.tuning import tune_linear
from bitwright.kernels.gpu import launch, library

# In the order of what is wanted most: what comes late may have to be left out.
SECTIONS: dict[str, Callable[[Bench], Section]] = {
    "ceilings": measure_ceilings,
    "few": measure_few_rows,
    "attention": measure_attention,
    "many": measure_many_rows,
    "decoding": measure_decoding,
    "rounding": measure_rounding,
    "memory": measure_memory,
    "others": measure_other_schemes,
    "writing": measure_writing,
}


def render(section: Section) -> str:
    """A section as text: title, aligned columns, notes."""
    cells = [section.columns, *(tuple(str(cell) for cell in row) for row in section.rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(section.columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([f"## {section.title}", *lines, *(f"note: {note}" for note in section.notes)])


def run_sections(bench: Bench, names: list[str]) -> list[Section]:
    """Every section of ``names``; a failure is a note of its own."""
    found = []
    for name in names:
        started = time.monotonic()
        if started > bench.deadline:
            found.append(Section(name, ("left out",), [], ["out of time"]))
            continue
        try:
            section = SECTIONS[name](bench)
        except Exception:
            if bench.is_dry:
                raise
            section = Section(name, ("failed",), [], [traceback.format_exc()])
        section.notes.append(f"{time.monotonic() - started:.0f} s")
        print(f"{name}: {len(section.rows)} rows in {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
        found.append(section)
        if not bench.is_dry:
            torch.cuda.empty_cache()
    return found


def tune(bench: Bench) -> tuple[Section, dict[str, Any]]:
    """The tuned rows of this GPU, used by everything that is measured after."""
    section, rows = tune_linear(bench)
    name = library.describe(bench.device).name
    if rows and rows[-1]["rows"] >= 1 << 29:
        launch.tuned()["gpus"].setdefault(name, {})["linear"] = rows
    return section, {name: {"linear": rows}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, with TRITON_INTERPRET=1")
    parser.add_argument("--seconds", type=float, default=540, help="no section begins later")
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--tune", action="store_true", help="look for the best launches first (some two minutes)")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU here: --dry-run, with TRITON_INTERPRET=1, runs every path at tiny sizes")
    bench = Bench(is_dry=arguments.dry_run, deadline=time.monotonic() + arguments.seconds)
    torch.manual_seed(0)
    first, tuned = tune(bench) if arguments.tune else (None, {})
    sections = run_sections(bench, arguments.sections)
    sections += [first] if first is not None else []
    facts = library.describe(bench.device)
    print(f"{facts.name}, {facts.processors} processors, torch {torch.__version__}, triton {triton.__version__}\n")
    print("\n\n".join(render(section) for section in sections))
    if arguments.json:
        record = {
            "command": shlex.join(["python", "-m", "benchmarks.gpu", *sys.argv[1:]]),
            "gpu": asdict(facts),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "ceilings": bench.ceilings,
            "tuned": tuned,
            "sections": [asdict(section) for section in sections],
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
