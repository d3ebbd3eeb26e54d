"""What runs inside a peer's own environment; it imports only what every peer has. bitwright takes part as one of them.

    python -m benchmarks.peers.driving hqq jobs.json

``jobs.json`` names a model directory, a file of calibration windows and a list of cells. Each cell is quantized in a
process of its own, so that its peak memory is its own: forked where the peer bears that, so that imports are paid once.
It leaves ``weights.safetensors`` (dequantized, float32, by the names in the model) or a directory ``checkpoint``, and
``made.json`` (seconds, peak resident bytes, or why not).
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

__all__ = ["Cell", "Refusal", "block_linears", "float_model", "main"]

PEERS = ("auto_round", "bitwright", "gptqmodel", "hqq", "llmcompressor", "neural_compressor")
UNFORKABLE = ("gptqmodel",)  # it starts threads when it is imported


class Refusal(Exception):
    """The peer does not offer this; the message says what."""


@dataclass(frozen=True)
class Cell:
    """One thing to quantize.

    Attributes:
        model: directory of float weights.
        text: a file from which bitwright cuts the same ``tokens``.
        tokens: int64 ``[samples, seqlen]``.
        method: one of the driver's ``METHODS``.
        code: ``int``, ``nf4`` or ``fp4``; bits, group (``None``: per channel), symmetric: as in our schemes.
        dtype: of the float model.
        keep_weights: write what came out; not where only time and memory are of interest.
    """

    model: str
    text: str
    tokens: Tensor
    output: Path
    method: str
    code: str
    bits: int
    group: int | None
    symmetric: bool
    threads: int
    dtype: torch.dtype
    keep_weights: bool


def float_model(cell: Cell) -> nn.Module:
    """The model, ready to be quantized."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(cell.model, dtype=cell.dtype).eval()
    return model


def block_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside the blocks, by name; the head stays as it is."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear) and ".layers." in name}


def _make(peer: Any, cell: Cell, output: Path) -> dict[str, Any]:
    """Quantize one cell; what it took. The clock runs over the peer's work, without loading and writing."""
    torch.set_num_threads(cell.threads)
    if cell.method not in peer.METHODS:
        raise Refusal(f"no method {cell.method}; it has {', '.join(peer.METHODS)}")
    model = float_model(cell)
    started = time.perf_counter()
    before = resource.getrusage(resource.RUSAGE_SELF)
    state: Mapping[str, Tensor] | None = peer.quantize(model, cell)
    seconds = time.perf_counter() - started
    usage = resource.getrusage(resource.RUSAGE_SELF)
    busy = usage.ru_utime + usage.ru_stime - before.ru_utime - before.ru_stime
    made = {"seconds": seconds, "processor_seconds": busy, "peak_bytes": usage.ru_maxrss * 1024}
    if state is not None and cell.keep_weights:
        _save(state, output)
    return made | {"versions": peer.versions()}


def _save(state: Mapping[str, Tensor], output: Path) -> None:
    kept = {name: value.detach().to("cpu", torch.float32).contiguous().clone() for name, value in state.items()}
    kept = {name: value for name, value in kept.items() if name != "lm_head.weight"}  # tied, and never quantized here
    save_file(kept, output / "weights.safetensors")


def _guarded(work: Callable[[], dict[str, Any]], output: Path) -> None:
    """Leave ``made.json``, whatever happens: a crash is a result."""
    try:
        record = work()
    except BaseException as error:
        told = traceback.format_exception_only(error)[-1].strip()
        told = f"refused: {error}" if isinstance(error, Refusal) else f"crashed: {told}"
        (output / "traceback.txt").write_text(traceback.format_exc())
        record = {"failed": told[:300]}
    (output / "made.json").write_text(json.dumps(record, indent=1))


def _work(peer: str, cell: Cell, output: Path) -> None:
    module = importlib.import_module(f"benchmarks.peers.{peer}_driver")
    _guarded(lambda: _make(module, cell, output), output)
    sys.stdout.flush()


def _start(peer: str, cell: Cell, output: Path, again: list[str]) -> None:
    """Run one cell in another process, and note it where that ends without a word."""
    log = os.open(output / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    if peer in UNFORKABLE:
        status = subprocess.run([*again, "--only", str(output)], stdout=log, stderr=log, check=False).returncode
    else:
        importlib.import_module(f"benchmarks.peers.{peer}_driver")
        child = os.fork()
        if child == 0:
            os.dup2(log, 1)
            os.dup2(log, 2)
            _work(peer, cell, output)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(log)
    if not (output / "made.json").is_file():
        record = {"failed": f"crashed: the process ended with status {status}"}
        (output / "made.json").write_text(json.dumps(record, indent=1))


def main() -> None:
    """Run the cells of a file of jobs, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("jobs", type=Path)
    parser.add_argument("--only", type=Path, help="the cell with this output, in this process")
    arguments = parser.parse_args()
    jobs = json.loads(arguments.jobs.read_text())
    tokens = load_file(jobs["tokens"])["windows"][: jobs.get("windows")]
    again = [sys.executable, "-m", "benchmarks.peers.driving", arguments.peer, str(arguments.jobs)]
    for fields in jobs["cells"]:
        output = Path(fields.pop("output"))
        output.mkdir(parents=True, exist_ok=True)
        given = {name: jobs[name] for name in ("model", "text", "threads")}
        given |= {"dtype": getattr(torch, jobs.get("dtype", "float32")), "keep_weights": jobs.get("keep_weights", True)}
        cell = Cell(**given, tokens=tokens, output=output, **fields)
        if arguments.only == output:
            _work(arguments.peer, cell, output)
        elif arguments.only is None:
            _start(arguments.peer, cell, output, again)
            print(output.name, (output / "made.json").read_text().replace("\n", " ")[:200], flush=True)


if __name__ == "__main__":
    importlib.import_module("benchmarks.peers.driving").main()  # the drivers' Refusal is that module's, not this one's
