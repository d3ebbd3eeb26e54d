"""Quantize a model that you hold in memory; no file is written. Any causal model of blocks will do."""

from __future__ import annotations

import torch

import bitwright

model = bitwright.load("demo:")
tokens = torch.tensor([[1, 5, 9, 40, 7, 300]])
before = model(input_ids=tokens).logits

prepared = bitwright.prepare(model, scheme="w4g64")  # a copy; it notes the batches that it is run on
prepared(input_ids=tokens)
quantized = bitwright.convert(prepared)

after = quantized(input_ids=tokens).logits
agreement = (before.argmax(-1) == after.argmax(-1)).float().mean()
print(f"the likeliest next token is the same at {agreement:.0%} of the positions")
