"""Other projects' names for what bitwright does: thin layers, in which no algorithm lives."""

from __future__ import annotations

__all__: list[str] = []
