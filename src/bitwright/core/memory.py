"""Giving freed memory back, so that the resident size follows what is in use."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache

__all__ = ["trim_memory"]


@cache
def _malloc_trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; other C libraries have none and need none."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def trim_memory() -> None:
    """Return freed heap pages to the system.

    glibc keeps freed blocks below its (growing) threshold of up to 32 MiB in its heaps, where small long-lived
    allocations between them hold whole blocks of weights hostage: a stream of equal blocks then grows without a leak.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)
