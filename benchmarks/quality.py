"""Every algorithm of bitwright and of its peers on the same models, tokens and schemes, judged by one judge.

    python -m benchmarks.peers.setup --work-dir DIR            # once: an environment for each peer
    python -m benchmarks.quality --work-dir DIR --peers-dir DIR

A cell (model, scheme, method) is made in its own process and judged on held-out text beside the float model; both
results stay in the work directory, so that a run that ends early goes on where it was. A peer's cell that was made or
refused is never made again; one of bitwright's is, when the sources changed (unless ``--keep``). A peer that crashes or
refuses is a row that says why. Tables go to benchmarks/results/quality.md, everything else to quality.json beside it.
The rows of such a file of an earlier run stand in the tables beside what this one makes (``--earlier FILE``); what
crashed is tried again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

import bitwright
from benchmarks.peers import bitwright_driver
from benchmarks.quality_runs.cells import OURS, PEERS, SCHEMES, VARIANTS, Cell, cells_of, peer_methods, stored_schemes
from benchmarks.quality_runs.judge import float_model, judge, load_weights
from benchmarks.quality_runs.material import MODELS, Material, prepare_material
from benchmarks.quality_runs.tables import compare, render
from bitwright.quantization.algorithms import ALGORITHMS

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"
RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    """Make, judge and write down."""
    options = parse_arguments()
    if options.earlier is not None and not options.earlier.is_file():
        raise SystemExit(f"{options.earlier} is not there")
    methods = [(OURS, name) for name in options.algorithms]
    methods += [(peer, method) for peer in options.peers for method in peer_methods(peer) if wanted(options, method)]
    materials, missing = [], []
    for name in options.models:
        material = prepare_material(
            name, models=options.shared / "models", data=options.shared / "data", work=options.work_dir
        )
        missing += [name] if material is None else []
        materials += [] if material is None else [material]
    earlier = {"models": [], "comparisons": []} if options.earlier is None else json.loads(options.earlier.read_text())
    # What crashed is tried again; its row stands if that makes nothing.
    done = [(model["name"], row) for model in earlier["models"] for row in model["rows"] if not has_crashed(row)]
    rows = {(name, *_place(row)): row for name, row in done}
    records = []
    for material in materials:
        cells = list(cells_of(material, options.schemes, methods, options.work_dir))
        if not (options.no_make or options.no_judge):
            make([cell for cell in cells if _key(cell) not in rows], options)
        # What this run has made takes the place of an earlier row, unless our sources have changed since.
        made = [cell for cell in cells if _key(cell) not in rows or is_made(cell, options)]
        records.append(judge_all(material, made, options))
    records = merge(earlier["models"], records)
    write(records, earlier.get("comparisons", []), [name for name in missing if name not in _names(records)], options)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True, help="where cells are kept")
    parser.add_argument("--peers-dir", type=Path, help="where benchmarks.peers.setup put the environments")
    parser.add_argument("--shared", type=Path, default=SHARED, help="folder of third-party models and texts")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--earlier", type=Path, help="quality.json of an earlier run, for what is not made in this one")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES), choices=list(SCHEMES), metavar="SCHEME")
    parser.add_argument("--algorithms", nargs="*", default=[*ALGORITHMS, *VARIANTS], metavar="ALGORITHM")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=list(PEERS), metavar="PEER")
    parser.add_argument("--methods", nargs="*", default=[], metavar="METHOD", help="only these methods of the peers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep our cells although the sources changed")
    parser.add_argument("--no-make", action="store_true", help="only judge and tabulate what is there")
    parser.add_argument("--no-judge", action="store_true", help="only tabulate what was judged; implies --no-make")
    parser.add_argument("--no-write", action="store_true", help="leave the tables alone")
    return parser.parse_args()


def merge(earlier: list[dict[str, Any]], records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """All models and rows of both; a row of ``records`` takes the place of an ``earlier`` one.

    Raises:
        ValueError: if both have a model, but not the same calibration or held-out tokens.
    """
    merged = {model["name"]: model for model in earlier}
    for record in records:
        before = merged.get(record["name"], record)
        for field in ("seqlen", "samples", "texts"):
            if before[field] != record[field]:
                raise ValueError(
                    f"{record['name']}: {field} is {record[field]}, and {before[field]} in the earlier table"
                )
        rows = {_place(row): row for row in before["rows"]} | {_place(row): row for row in record["rows"]}
        merged[record["name"]] = record | {"rows": list(rows.values())}
    return [merged[name] for name in MODELS if name in merged]


def _names(records: list[dict[str, Any]]) -> list[str]:
    return [record["name"] for record in records]


def _place(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return row["stored"], row["peer"], row["method"]


def _key(cell: Cell) -> tuple[str, str, str, str]:
    return cell.material.name, cell.scheme.name, cell.peer, cell.method


def has_crashed(row: Mapping[str, Any]) -> bool:
    return str(row.get("failed", "")).startswith("crashed")


def wanted(options: argparse.Namespace, method: str) -> bool:
    return not options.methods or method in options.methods


def make(cells: Iterable[Cell], options: argparse.Namespace) -> None:
    """What is missing, one process for each peer and model."""
    for peer, group in groupby(cells, key=lambda cell: cell.peer):
        lacking = [cell for cell in group if not is_made(cell, options)]
        if peer == OURS:
            python = Path(sys.executable)
        elif options.peers_dir is None:
            continue
        else:
            python = options.peers_dir / PEERS[peer] / "bin" / "python"
        if not lacking or not python.is_file():
            continue
        for cell in lacking:
            shutil.rmtree(cell.folder, ignore_errors=True)
        run_driver(python, peer, lacking, options.threads)


def is_made(cell: Cell, options: argparse.Namespace) -> bool:
    made = read(cell.folder / "made.json")
    if made is None or has_crashed(made):
        return False
    if cell.peer != OURS or options.keep:
        return True
    return made.get("versions") == bitwright_driver.versions()


def run_driver(python: Path, peer: str, cells: list[Cell], threads: int) -> None:
    material = cells[0].material
    jobs = {
        "model": str(material.directory),
        "text": str(material.calibration_text),
        "tokens": str(material.calibration_file),
        "threads": threads,
        "cells": [cell.job() for cell in cells],
    }
    paths = [str(ROOT), str(ROOT / "src")] if peer == OURS else [str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "jobs.json"
        path.write_text(json.dumps(jobs))
        started = time.perf_counter()
        command = [str(python), "-m", "benchmarks.peers.driving", peer, str(path)]
        subprocess.run(command, cwd=ROOT, env=environment, check=False)
    print(f"{material.name}: {len(cells)} of {peer} in {time.perf_counter() - started:.0f} s", flush=True)


def judge_all(material: Material, cells: Iterable[Cell], options: argparse.Namespace) -> dict[str, Any]:
    """The record of one model; weights of a judged cell are deleted."""
    reference = float_model(material)
    path = options.work_dir / material.name / "float.json"
    beside = read(path)
    if beside is None:
        beside = judge(material, None, reference)
        path.write_text(json.dumps(beside))
    rows = []
    for cell in cells:
        made = read(cell.folder / "made.json")
        is_judged = (cell.folder / "judged.json").is_file() or (made is not None and "failed" in made)
        if made is None or (options.no_judge and not is_judged):
            continue
        row = {"scheme": cell.scheme_name, "stored": cell.scheme.name, "peer": cell.peer, "method": cell.method}
        rows.append(row | {"family": cell.family} | made | judge_cell(cell, made, reference))
    facts = {"name": material.name, "seqlen": material.seqlen, "samples": len(material.calibration)}
    return facts | {"texts": material.texts, "stored": stored_schemes(material), "float": beside, "rows": rows}


def judge_cell(cell: Cell, made: dict[str, Any], reference: nn.Module) -> dict[str, Any]:
    if "failed" in made:
        return {}
    path = cell.folder / "judged.json"
    judged = read(path)
    if judged is None:
        try:
            judged = judge(cell.material, load_result(cell), reference)
        except (ValueError, bitwright.BitwrightError) as error:
            judged = {"failed": f"not usable: {str(error)[:300]}"}
        path.write_text(json.dumps(judged))
        shown = judged.get("failed") or f"ppl {judged['ppl']:.4f} KL {judged['kl']:.5f}"
        print(f"{cell.material.name} {cell.scheme_name} {cell.peer} {cell.method} {shown}", flush=True)
    (cell.folder / "weights.safetensors").unlink(missing_ok=True)
    shutil.rmtree(cell.folder / "checkpoint", ignore_errors=True)
    return judged


def load_result(cell: Cell) -> nn.Module:
    if (cell.folder / "checkpoint").is_dir():
        model: nn.Module = bitwright.load(cell.folder / "checkpoint", dtype=torch.float32)
        return model
    return load_weights(cell.material, load_file(cell.folder / "weights.safetensors"))


def read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def write(
    records: list[dict[str, Any]], earlier: list[dict[str, Any]], missing: list[str], options: argparse.Namespace
) -> None:
    command = "python -m benchmarks.quality --work-dir DIR --peers-dir DIR"
    date = time.strftime("%Y-%m-%d")
    record = {"command": command, "date": date, "torch": torch.__version__, "threads": options.threads}
    record |= {"models": records, "comparisons": compare(records, earlier), "missing": missing}
    text = render(record)
    if options.no_write:
        print(text)
        return
    for row in [row for model in records for row in (model["float"], *model["rows"])]:
        row.pop("kl_windows", None)  # they stay in the work directory
        row.pop("loss_windows", None)
    (options.output / "quality.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.output / "quality.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
