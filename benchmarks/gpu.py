"""The GPU path in one run of at most ten minutes: ceilings, products, attention, whole models, memory, quantizing.

    python -m benchmarks.gpu --json benchmarks/results/gpu.json
    TRITON_INTERPRET=1 python -m benchmarks.gpu --dry-run      # every path once, on a CPU, at tiny sizes

Times are medians, of work recorded in CUDA graphs, over operands too many for the caches. Ratios are to the vendor's
bf16 product of the same run; errors are against float64 on the numbers stored. Tables come last, those of sections that
have ended also as they come, on the error output. A section that fails says why, and the others go on; rows that there
is no time for are left out and named. The JSON file is written anew after every section, and tables are printed also
where the run is broken off (SIGTERM). After a fault that the GPU does not recover from (an address that does not exist,
say) the sections that are left run in a new process.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
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


def run_sections(bench: Bench, names: list[str], keep: Callable[[], None]) -> list[str]:
    """Every section of ``names``, kept after each; a failure is a note of its own, and the others go on, unless the
    GPU answers this process no more: the names of those that are left then."""
    for number, name in enumerate(names, 1):
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
        if not bench.is_dry and not give_back():
            return names[number:]
    return []


def give_back() -> bool:
    """Give unused memory back; whether the GPU still answers this process."""
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError as error:
        print(f"the GPU no longer answers: {error}", file=sys.stderr, flush=True)
        return False
    return True


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


def tune(bench: Bench, keep: Callable[[dict[str, Any]], None]) -> bool:
    """The tuned rows of this GPU, by kernel, used by everything that is measured after; ``keep`` gets them after each.
    Whether the GPU still answers."""
    name, found = library.describe(bench.device).name, {}
    for kernel, most in SECONDS.items():
        bench.section_deadline = time.monotonic() + most
        before = len(bench.sections)
        try:
            section, rows = tune_attention(bench) if kernel == "attention" else tune_products(bench, kernel)
        except Exception:
            if bench.is_dry:
                raise
            section = bench.sections[-1] if len(bench.sections) > before else bench.begin(kernel, ("failed",))
            section.notes.append(traceback.format_exc())
        else:
            found[kernel] = rows
            launch.tuned()["gpus"].setdefault(name, {})[kernel] = rows  # for all that is measured after
            keep({name: found})
        print(render(section), file=sys.stderr, flush=True)
        if not bench.is_dry and not give_back():
            return False
    return True


def take_up(bench: Bench, path: Path) -> dict[str, Any]:
    """What a process before this one has found: into ``bench`` and the table of launches; its tuned rows."""
    record = json.loads(path.read_text(encoding="utf-8"))
    bench.ceilings.update(record["ceilings"])
    for each in record["sections"]:
        rows = [tuple(row) for row in each["rows"]]
        bench.sections.append(Section(each["title"], tuple(each["columns"]), rows, each["notes"]))
    tuned: dict[str, Any] = record["tuned"]
    for name, rows_of_kernels in tuned.items():
        launch.tuned()["gpus"].setdefault(name, {}).update(rows_of_kernels)
    return tuned


def go_on(bench: Bench, tuned: dict[str, Any], names: list[str], path: Path | None) -> None:
    """Let a new process, in the place of this one, run the sections ``names`` and print all tables."""
    path = path or Path(tempfile.mkdtemp()) / "gpu.json"
    write_record(bench, tuned, path)
    left = max(0.0, bench.deadline - time.monotonic())
    command = [sys.executable, "-m", "benchmarks.gpu", "--after", str(path), "--json", str(path),
               "--seconds", f"{left:.0f}", "--sections", *names]  # fmt: skip
    sys.stdout.flush()
    os.execv(command[0], command)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, with TRITON_INTERPRET=1")
    parser.add_argument("--seconds", type=float, default=510, help="no section begins later; imports come before")
    parser.add_argument("--sections", nargs="*", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument(
        "--tune", action="store_true", help="look for the best launches first (at most two and a half minutes)"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--after", type=Path, help="a JSON file of a run before, whose tables are printed first")
    arguments = parser.parse_args()
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("there is no GPU here: --dry-run, with TRITON_INTERPRET=1, runs every path at tiny sizes")
    return arguments


def main() -> None:
    arguments, tuned = parse_arguments(), {}
    bench = Bench(is_dry=arguments.dry_run, deadline=time.monotonic() + arguments.seconds)
    if arguments.after is not None:
        tuned.update(take_up(bench, arguments.after))
    torch.manual_seed(0)
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, _end)
    try:
        rest: list[str] = arguments.sections
        if not arguments.tune or tune(bench, tuned.update):
            rest = run_sections(bench, rest, lambda: write_record(bench, tuned, arguments.json))
        if rest:
            go_on(bench, tuned, rest, arguments.json)
    except KeyboardInterrupt:
        print("broken off; this is what there is", file=sys.stderr)
    finally:
        write_record(bench, tuned, arguments.json)
        facts = library.describe(bench.device)
        print(f"{facts.name}, {facts.processors} processors, torch {torch.__version__}, triton {triton.__version__}\n")
        print("\n\n".join(map(render, bench.sections)))


if __name__ == "__main__":
    main()
