"""The names for PyTorch models."""

from __future__ import annotations

__all__: list[str] = []
