"""Memory of a cache of keys and values by batch and by length: the two documents' tables, planned and measured.

    python -m benchmarks.memory

Planned for the shapes of the documents' models, weights included; and measured on a small model, whose cache is filled
and weighed, beside what the planner says of it. Writes a table and a record into benchmarks/results/.

The GB of Qwen's document are 2^30 bytes: its 8-bit row for 512 tokens says 15 GB, and 15e9 bytes would be less than the
weights alone (15.44e9). So are ours here.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

import bitwright
from benchmarks.command import told_command
from bitwright.core.kv_scheme import kv_bytes, parse_kv

RESULTS = Path(__file__).resolve().parent / "results"
MIB, GIB = 1 << 20, 1 << 30
# Layers, heads of keys and values and their width, and bytes of bf16 weights.
SHAPES = {
    "Llama-7B": ({"layers": 32, "kv_heads": 32, "head_dim": 128}, 13_476_839_424),
    "InternLM-7B": ({"layers": 32, "kv_heads": 32, "head_dim": 128}, 14_642_765_824),
    "Qwen-7B": ({"layers": 32, "kv_heads": 32, "head_dim": 128}, 15_442_649_088),
}
SCHEMES = ("none", "int8-static", "int8", "k8v4", "int4", "int4-rotated", "int2")
BATCHES, LENGTHS, DIFFERENCES = (1, 4, 16, 32, 64, 100), (512, 1024, 2048, 4096, 8192), (8, 16, 32, 48)
DOCUMENT = {8: 4096, 16: 8224, 32: 16448, 48: 24672}  # MiB saved, as LMDeploy's document measured
# What Qwen's table implies for each sequence of 1,024 tokens, from its columns for 16 and 32 sequences.
SEQUENCES = {"bf16": (48.7 - 31.7) / 16 * GIB, "8 bits": (30.2 - 22.3) / 16 * GIB}
DEVICE = 80 * GIB  # of the documents' accelerator
MEASURED = {"num_hidden_layers": 4, "num_key_value_heads": 4, "num_attention_heads": 8, "hidden_size": 512}


def batch_table(name: str) -> list[dict[str, Any]]:
    """Bytes of weights and cache by batch, 1,024 tokens each, as in Qwen's document."""
    shape, weights = SHAPES[name]
    return [
        {"scheme": scheme}
        | {str(batch): weights + kv_bytes(parse_kv(scheme), tokens=1024, batch=batch, **shape) for batch in BATCHES}
        for scheme in SCHEMES
    ]


def length_table(name: str) -> list[dict[str, Any]]:
    """Bytes of weights and cache by length, one sequence."""
    shape, weights = SHAPES[name]
    return [
        {"scheme": scheme}
        | {str(tokens): weights + kv_bytes(parse_kv(scheme), tokens=tokens, **shape) for tokens in LENGTHS}
        for scheme in SCHEMES
    ]


def difference_table(name: str) -> list[dict[str, Any]]:
    """MiB of fp16 and 8-bit caches of 2,048 tokens by batch, and the difference, as in LMDeploy's document."""
    shape, _ = SHAPES[name]
    rows = []
    for batch in DIFFERENCES:
        plain, coded = (kv_bytes(parse_kv(each), tokens=2048, batch=batch, **shape) for each in ("none", "int8-static"))
        rows.append({"batch": batch, "fp16": plain / MIB, "int8": coded / MIB, "saved": (plain - coded) / MIB})
    return rows


def measured_table() -> list[dict[str, Any]]:
    """Real caches, filled as a model fills them, beside the planner."""
    config = LlamaConfig(**MEASURED, intermediate_size=64, vocab_size=64)
    shape = {"layers": 4, "kv_heads": 4, "head_dim": 64}
    rows = []
    for scheme in ("none", "int8", "int4-rotated", "k8v4", "fp8", "int2"):
        for batch, tokens in ((1, 8192), (8, 1024), (32, 512)):
            cache = bitwright.QuantizedCache(config, scheme)
            for layer in range(shape["layers"]):
                for count in (tokens - 3, 1, 1, 1):
                    new = torch.randn(batch, shape["kv_heads"], count, shape["head_dim"], dtype=torch.bfloat16)
                    cache.update(new, new, layer)
            planned = kv_bytes(parse_kv(scheme), tokens=tokens, batch=batch, **shape)
            rows.append(
                {"scheme": scheme, "batch": batch, "tokens": tokens, "planned": planned, "measured": cache.nbytes}
            )
    return rows


def render(record: dict[str, Any]) -> str:
    lines = ["# Memory of the cache of keys and values", ""]
    for name, tables in record["planned"].items():
        lines += [f"## {name}: weights in bf16 and cache, GiB (planned; - where 80 GiB are not enough)", ""]
        for key, what in (("batch", "1,024 tokens, by batch"), ("length", "one sequence, by tokens")):
            columns = [column for column in tables[key][0] if column != "scheme"]
            lines += [f"| {what} | {' | '.join(columns)} |", f"|---|{'--:|' * len(columns)}"]
            for row in tables[key]:
                cells = [f"{row[each] / GIB:.1f}" if row[each] < DEVICE else "-" for each in columns]
                lines.append(f"| {row['scheme']} | {' | '.join(cells)} |")
            lines.append("")
    lines += ["## One sequence of 1,024 tokens, 32 layers, 32 heads of 128, beside what Qwen's table implies", ""]
    told = [f"{name} ({size / GIB:.3f} GiB)" for name, size in SEQUENCES.items()]
    lines += [f"| scheme | GiB | {' | '.join(f'of their {each}' for each in told)} |", "|---|--:|--:|--:|"]
    for scheme in SCHEMES:
        own = kv_bytes(parse_kv(scheme), tokens=1024, **SHAPES["Qwen-7B"][0])
        shares = " | ".join(f"{own / size:.2f}" for size in SEQUENCES.values())
        lines.append(f"| {scheme} | {own / GIB:.3f} | {shares} |")
    lines += [""]
    lines += ["## Cache of 2,048 tokens, 32 layers, 32 heads of 128, MiB", ""]
    lines += ["| batch | fp16 | int8-static | saved | LMDeploy's document | off by |", "|--:|--:|--:|--:|--:|--:|"]
    for row in record["differences"]:
        told = DOCUMENT[row["batch"]]
        figures = (
            f"{row['fp16']:.0f} | {row['int8']:.0f} | {row['saved']:.0f} | {told} | {row['saved'] / told - 1:+.2%}"
        )
        lines.append(f"| {row['batch']} | {figures} |")
    lines += ["", "## Real caches beside the planner: 4 layers, 4 heads of 64, bytes", ""]
    lines += ["| scheme | batch | tokens | planned | measured | off by |", "|---|--:|--:|--:|--:|--:|"]
    for row in record["measured"]:
        off = row["measured"] / row["planned"] - 1
        figures = f"{row['planned']:,} | {row['measured']:,} | {off:+.2%}"
        lines.append(f"| {row['scheme']} | {row['batch']} | {row['tokens']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    """Plan, measure, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS)
    options = parser.parse_args()
    record = {
        "command": told_command("benchmarks.memory"),
        "planned": {name: {"batch": batch_table(name), "length": length_table(name)} for name in SHAPES},
        "differences": difference_table("Llama-7B"),
        "measured": measured_table(),
    }
    text = render(record)
    print(text)
    (options.output / "memory.md").write_text(text + "\n", encoding="utf-8")
    (options.output / "memory.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
