"""The GPU path in one run of at most ten minutes: ceilings, products, attention, whole models, memory, quantizing.

    python -m benchmarks.gpu --json benchmarks/results/gpu.json
    TRITON_INTERPRET=1 python -m benchmarks.gpu --dry-run      # every path once, on a CPU, at tiny sizes

Times are medians, of work recorded in CUDA graphs, over operands too many for the caches. Ratios are to the vendor's
bf16 product of the same run; errors are against float64 on the numbers stored. Tables come last, those of sections that
have ended also as they come, on the error output. A section that fails says why, and the others go on; rows that there
is no time for are left out and named. The JSON file is written anew after every section, and tables are printed also
where the run is broken off (SIGTERM).
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import triton

from benchmarks.command import told_command
from benchmarks.gpu_runs.caches import measure_attention, measure_writing
from benchmarks.gpu_runs.decoding import measure_decoding, measure_memory
from benchmarks.gpu_runs.invariance import measure_invariance
from benchmarks.gpu_runs.products import (
    measure_ceilings,
    measure_few_rows,
    measure_many_rows,
    measure_other_schemes,
)
from benchmarks.gpu_runs.rounding import measure_rounding
from benchmarks.gpu_runs.serving import measure_serving
from benchmarks.gpu_runs.streaming import measure_streaming
from benchmarks.gpu_runs.timing import Bench, Section
from benchmarks.gpu_runs.tuning import SECONDS, tune_attention, tune_products
from bitwright.kernels.gpu import launch, library

# In the order of what is wanted most: what comes late may have to be left out. Seconds that each may take at most.
SECTIONS: dict[str, tuple[Callable[[Bench], Section], int]] = {
    "ceilings": (measure_ceilings, 30),
    "few": (measure_few_rows, 120),
    "attention": (measure_attention, 80),
    "many": (measure_many_rows, 80),
    "decoding": (measure_decoding, 130),
    "rounding": (measure_rounding, 90),
    "memory": (measure_memory, 30),
    "engine": (measure_serving, 60),
    "streaming": (measure_streaming, 60),
    "invariance": (measure_invariance, 40),
    "others": (measure_other_schemes, 60),
    "writing": (measure_writing, 20),
}
GRACE = 30  # seconds after which a section that has not ended is broken off; what it has is kept


class OutOfTime(BaseException):  # which nothing takes for a failure
    """A section has had its time."""


def render(section: Section) -> str:
    """A section as text: title, aligned columns, notes."""
    cells = [section.columns, *(tuple(str(cell) for cell in row) for row in section.rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(section.columns))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in cells]
    return "\n".join([f"## {section.title}", *lines, *(f"note: {note}" for note in section.notes)])


def run_sections(bench: Bench, names: list[str], keep: Callable[[], None]) -> None:
    """Every section of ``names``, kept after each; a failure is a note of its own, and the others go on."""
    for name in names:
        started = time.monotonic()
        measure, most = SECTIONS[name]
        if started > bench.deadline:
            bench.begin(name, ("left out",)).notes.append("out of time")
            continue
        bench.section_deadline = started + most
        before = len(bench.sections)
        try:
            if not bench.is_dry:
                signal.setitimer(signal.ITIMER_REAL, min(most, max(1.0, bench.deadline - started)) + GRACE)
            measure(bench)
        except (Exception, OutOfTime) as error:
            if bench.is_dry:
                raise
            section = bench.sections[-1] if len(bench.sections) > before else bench.begin(name, ("failed",))
            section.notes.append("broken off" if isinstance(error, OutOfTime) else traceback.format_exc())
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
        section = bench.sections[-1]
        section.notes.append(f"{time.monotonic() - started:.0f} s")
        print(render(section), file=sys.stderr, flush=True)
        keep()
        if not bench.is_dry:
            torch.cuda.empty_cache()


def write_record(bench: Bench, tuned: dict[str, Any], path: Path | None) -> None:
    """All that is known so far, as JSON."""
    if path is None:
        return
    record = {
        "command": told_command("benchmarks.gpu"),
        "gpu": asdict(library.describe(bench.device)),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "ceilings": bench.ceilings,
        "tuned": tuned,
        "sections": [asdict(section) for section in bench.sections],
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _end(number: int, _frame: object) -> None:
    raise OutOfTime if number == signal.SIGALRM else KeyboardInterrupt


def tune(bench: Bench) -> dict[str, Any]:
    """The tuned rows of this GPU, by kernel, used by everything that is measured after."""
    name, found = library.describe(bench.device).name, {}
    for kernel, most in SECONDS.items():
        bench.section_deadline = time.monotonic() + most
        section, rows = tune_attention(bench) if kernel == "attention" else tune_products(bench, kernel)
        found[kernel] = rows
        print(render(section), file=sys.stderr, flush=True)
        launch.tuned()["gpus"].setdefault(name, {})[kernel] = rows  # for all that is measured after
    return {name: found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, with TRITON_INTERPRET=1")
    parser.add_argument("--seconds", type=float, default=510, help="no section begins later; imports come before")
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument(
        "--tune", action="store_true", help="look for the best launches first (at most two and a half minutes)"
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU here: --dry-run, with TRITON_INTERPRET=1, runs every path at tiny sizes")
    bench, tuned = Bench(is_dry=arguments.dry_run, deadline=time.monotonic() + arguments.seconds), {}
    torch.manual_seed(0)
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, _end)
    try:
        if arguments.tune:
            tuned.update(tune(bench))
        run_sections(bench, arguments.sections, lambda: write_record(bench, tuned, arguments.json))
    except KeyboardInterrupt:
        print("broken off; this is what there is", file=sys.stderr)
    finally:
        write_record(bench, tuned, arguments.json)
        facts = library.describe(bench.device)
        print(f"{facts.name}, {facts.processors} processors, torch {torch.__version__}, triton {triton.__version__}\n")
        print("\n\n".join(map(render, bench.sections)))


if __name__ == "__main__":
    main()
