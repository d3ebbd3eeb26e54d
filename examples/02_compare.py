"""What do fewer bits cost? Compare three schemes with the model that they were made from."""

from __future__ import annotations

import tempfile
from pathlib import Path

import bitwright

TEXT = "Once upon a time there was a small house by the sea. Every morning a girl looked out of its window. " * 20

with tempfile.TemporaryDirectory() as folder:
    text = Path(folder) / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    outputs = []
    for scheme in ("w8", "w4g32", "nf4g32"):
        bitwright.quantize("demo:", f"{folder}/{scheme}", scheme=scheme)
        outputs.append(f"{folder}/{scheme}")

    comparison = bitwright.eval(outputs, reference="demo:", text=text, seqlen=128, probes=False)
    for row in comparison.rows:
        print(f"{Path(row.name).name:8} {row.bits_per_weight:6.2f} bits  perplexity {row.perplexity:6.3f}")
