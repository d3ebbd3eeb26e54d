"""The names for PyTorch models."""

from __future__ import annotations

from bitwright.compat.neural_compressor.torch.empty_model import load_empty_model

__all__ = ["load_empty_model"]
