"""How many threads torch uses for arithmetic, for as long as something lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["thread_count"]


@contextmanager
def thread_count(threads: int | None) -> Iterator[None]:
    """Let torch use ``threads`` threads; ``None`` changes nothing."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
