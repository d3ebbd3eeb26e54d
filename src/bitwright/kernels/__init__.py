"""Packed operands in memory, and what computes on them."""

from __future__ import annotations

__all__: list[str] = []
