"""Many requests at once on one model: scheduling, pages of the cache, sampling, text."""

from __future__ import annotations

__all__: list[str] = []
