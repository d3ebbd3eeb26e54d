"""Finding, loading and running causal language models."""

from __future__ import annotations

__all__: list[str] = []
