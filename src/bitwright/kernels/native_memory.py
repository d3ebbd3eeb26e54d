"""Room for operands in large pages of memory, as decoding reads all of them for every token.

Operands are put one after the other into mapped pieces, because a page of 2 MiB is larger than many of them. A piece is
given back when the last operand in it is gone.
"""

from __future__ import annotations

import mmap
import threading
import weakref

import torch
from torch import Tensor

__all__ = ["make_room"]

PIECE = 64 << 20
LINE = 64  # operands begin at lines of the processor's caches
SMALLEST = 1 << 14  # what is smaller gains nothing

_lock = threading.Lock()
_last: list[tuple[weakref.ref[mmap.mmap], int]] = []  # the piece that is being filled, and how far it is


def make_room(size: int) -> Tensor:
    """Uninitialized bytes, uint8 ``[size]``."""
    if size < SMALLEST or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(size, dtype=torch.uint8)
    with _lock:
        piece, used = _last[0][0]() if _last else None, _last[0][1] if _last else 0
        if piece is None or used + size > len(piece):
            try:
                piece, used = mmap.mmap(-1, -(-size // PIECE) * PIECE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), 0
                piece.madvise(mmap.MADV_HUGEPAGE)
            except (OSError, ValueError):  # no such memory, or a kernel without large pages
                return torch.empty(size, dtype=torch.uint8)
        _last[:] = [(weakref.ref(piece), -(-(used + size) // LINE) * LINE)]
        return torch.frombuffer(piece, dtype=torch.uint8, count=size, offset=used)
