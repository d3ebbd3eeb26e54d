"""Parts of :mod:`benchmarks.gpu`."""

from __future__ import annotations

__all__: list[str] = []
