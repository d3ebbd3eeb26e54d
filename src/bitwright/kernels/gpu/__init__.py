"""Triton kernels for NVIDIA GPUs: packed weights, 8-bit activations, attention on a paged cache. Needs no compiler."""

from __future__ import annotations

__all__: list[str] = []
