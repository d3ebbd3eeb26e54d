"""The names of Intel Neural Compressor's weight-only quantization, from its document of that name."""

from __future__ import annotations

__all__: list[str] = []
