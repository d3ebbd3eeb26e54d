"""Gated activations on the GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.kernels.gpu import library

__all__ = ["silu_multiply"]

BLOCK = 1024


def silu_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """``gate * sigmoid(gate) * up`` (``[rows, columns]`` both, rows of any stride), computed in float32."""
    rows, columns = gate.shape
    y = torch.empty(rows, columns, dtype=gate.dtype, device=gate.device)
    if rows:
        library.program("gates").silu_multiply[(rows, -(-columns // BLOCK))](
            gate, up, y, columns, gate.stride(0), up.stride(0), BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
        )
    return y
