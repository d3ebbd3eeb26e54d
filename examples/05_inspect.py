"""How is each layer stored, what does it cost, and which kernel runs it here?"""

from __future__ import annotations

import tempfile
from collections import Counter

import bitwright

with tempfile.TemporaryDirectory() as folder:
    bitwright.quantize("demo:", folder + "/nf4", scheme="nf4g64-dq")
    found = bitwright.inspect(folder + "/nf4")

print(f"{found.architecture} in the {found.format} format, {found.weight_bytes / 1e6:.1f} MB")
print(f"{found.bits_per_weight:.3f} bits for each quantized weight")
print("kernels:", dict(Counter(layer.kernel for layer in found.layers)))
print("cores here:", bitwright.doctor().usable_cores)
