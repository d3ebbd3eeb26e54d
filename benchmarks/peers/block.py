"""The peers on one Llama-3-8B-shaped block: seconds and peak memory, scaled to 128 windows.

    python -m benchmarks.peers.block --work-dir DIR --peers-dir DIR --json benchmarks/results/block_peers.json

The block (hidden 4096, intermediate 14336, 32 heads, 8 key-value heads, bf16, random weights) is a model of one block
with a small vocabulary. Each peer quantizes it twice, with ``--windows`` windows and with half of them, of 512 tokens;
the difference is what depends on the tokens, and the line through both is read at 128 windows. With 128 windows, and
without data, it does so once. The times of a shared machine are also given in processor seconds over threads, which
other work disturbs less.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.quality_runs.cells import PEERS
from bitwright.models.embedded_model import embedded_directory

__all__ = ["make_model", "measure"]

ROOT = Path(__file__).resolve().parents[2]
SHAPE = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
VOCABULARY, WINDOW, FULL = 2048, 512, 128  # the vocabulary of the embedded model, whose tokenizer is used
BFLOAT16, FLOAT32 = "bfloat16", "float32"
# Peer, method: whether the calibration tokens count, and the dtype of the model.
METHODS = {
    ("gptqmodel", "gptq"): (True, BFLOAT16),
    ("llmcompressor", "gptq-actorder"): (True, BFLOAT16),
    ("neural_compressor", "gptq"): (True, BFLOAT16),
    ("hqq", "hqq"): (False, BFLOAT16),
    ("llmcompressor", "rtn"): (False, BFLOAT16),
    ("llmcompressor", "awq"): (True, BFLOAT16),
    ("neural_compressor", "teq"): (True, FLOAT32),  # a step on each window; in bfloat16 it crashes
    ("auto_round", "autoround-3"): (False, BFLOAT16),
    ("auto_round", "autoround-9"): (False, BFLOAT16),
}

# What is measured, what it is called in the record, and whether it is divided by the threads.
TIMES = (("seconds", "seconds", False), ("processor_seconds", "processor_seconds_per_thread", True))


def make_model(directory: Path) -> None:
    """A bf16 model of one block, normal random weights, with windows of random tokens beside it."""
    if (directory / "config.json").is_file():
        return
    config = LlamaConfig(**SHAPE, num_hidden_layers=1, vocab_size=VOCABULARY, tie_word_embeddings=True)
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):  # some peers insist on one
        shutil.copy(embedded_directory() / name, directory)
    save_file({"windows": torch.randint(VOCABULARY, (FULL, WINDOW))}, directory / "tokens.safetensors")


def run(peer: str, method: str, dtype: str, windows: int, options: argparse.Namespace) -> dict[str, Any]:
    """What one process needed."""
    model, output = options.work_dir / "block-model", options.work_dir / "block" / f"{peer}.{method}.{windows}"
    record = output / "made.json"
    if not record.is_file():
        shutil.rmtree(output, ignore_errors=True)
        cell = {"method": method, "code": "int", "bits": 4, "group": 128, "symmetric": False, "output": str(output)}
        jobs = {"model": str(model), "text": "", "tokens": str(model / "tokens.safetensors"), "dtype": dtype}
        jobs |= {"threads": options.threads, "windows": windows, "keep_weights": False, "cells": [cell]}
        path = options.work_dir / "block-jobs.json"
        path.write_text(json.dumps(jobs))
        python = options.peers_dir / PEERS[peer] / "bin" / "python"
        extra = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(options.threads)}
        command = [str(python), "-m", "benchmarks.peers.driving", peer, str(path)]
        subprocess.run(command, cwd=ROOT, env=os.environ | extra, check=False)
    found: dict[str, Any] = json.loads(record.read_text()) if record.is_file() else {"failed": "no result"}
    return found


def measure(peer: str, method: str, options: argparse.Namespace) -> dict[str, Any]:
    """The row of one method: seconds at so many windows, and at ``FULL`` along the line through both."""
    needs_tokens, dtype = METHODS[peer, method]
    is_line = needs_tokens and options.windows < FULL
    counts = (options.windows // 2, options.windows) if is_line else (options.windows,)
    found = [run(peer, method, dtype, count, options) for count in counts]
    row: dict[str, Any] = {"peer": peer, "method": method, "windows": options.windows, "threads": options.threads}
    row["dtype"] = dtype
    failed = next((record["failed"] for record in found if "failed" in record), None)
    if failed is not None:
        return row | {"failed": failed}
    row |= {"versions": found[-1]["versions"], "peak_bytes": found[-1]["peak_bytes"]}
    for field, name, unit in TIMES:
        values = [record[field] / (options.threads if unit else 1) for record in found]
        slope = (values[-1] - values[0]) / (counts[-1] - counts[0]) if is_line else 0.0
        row |= {name: values[-1], f"{name}_scaled": values[-1] + slope * (FULL - options.windows)}
    return row


def main() -> None:
    """Measure what was asked for and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--peers-dir", type=Path, required=True)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", help="PEER.METHOD")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    make_model(options.work_dir / "block-model")
    rows = []
    for peer, method in METHODS:
        if options.only and f"{peer}.{method}" not in options.only:
            continue
        rows.append(measure(peer, method, options))
        print(json.dumps(rows[-1]), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
