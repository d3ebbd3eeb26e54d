"""Quantize the embedded model to 4 bits, load the result, and let it write."""

from __future__ import annotations

import tempfile

import bitwright

with tempfile.TemporaryDirectory() as folder:
    report = bitwright.quantize("demo:", f"{folder}/w4", scheme="w4g128")
    print(f"{report.source_bytes / 1e6:.1f} MB became {report.weight_bytes / 1e6:.1f} MB")
    print(f"{report.bits_per_weight:.2f} bits for each quantized weight, scales included")

    model = bitwright.load(f"{folder}/w4")  # a transformers model whose linear layers run from packed codes
    print(bitwright.generate(model, "Once upon a time", max_tokens=40))
