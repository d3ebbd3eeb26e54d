"""Give some layers another scheme: by pattern, by exact name, or none at all. Then read the record."""

from __future__ import annotations

import tempfile

import bitwright

OVERRIDES = [
    r".*\.down_proj=w8g32",  # a regular expression that must match the whole name
    "model.layers.0.self_attn.q_proj=float",  # left as it is
]

with tempfile.TemporaryDirectory() as folder:
    report = bitwright.quantize("demo:", folder + "/mixed", scheme="w3g32", overrides=OVERRIDES)
    for name, row in list(report.layers.items())[:7]:
        print(f"{name:40} {row['scheme']:8} {row['bits_per_weight']:.2f} bits  error {row['relative_error']:.4f}")
    print("worst:", report.worst_layers(3))
