"""Schemes, grids, codes and errors: what every other layer is typed by."""

from __future__ import annotations

__all__: list[str] = []
