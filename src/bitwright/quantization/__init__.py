"""Making quantized models: the block stream and its algorithms."""

from __future__ import annotations

__all__: list[str] = []
