"""Memory for operands in large pages, as decoding reads all of them for every token.

Operands are put one after the other into mapped pieces, because a page of 2 MiB is larger than many of them, and what
is freed between them would leave holes. A piece is given back when the last operand in it is gone.
"""

from __future__ import annotations

import mmap
import threading
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from bitwright.core.memory import map_memory

__all__ = ["Arena", "Room", "shared_room"]

Room = Callable[[int], Tensor]  # so many uninitialized bytes, uint8 [size]
PIECE = 64 << 20  # taken from the system at a time; what is not written yet takes no memory
LINE = 64  # operands begin at lines of the processor's caches, which are vectors of the widest instruction set
SMALLEST = 1 << 14  # what is smaller gains nothing, and would keep a piece alive


class Arena:
    """Gives room to tensors that stay together.

    Args:
        apart: for tensors that go one by one: each has a storage of its own, so that a copy of one is no copy of all,
            and only they keep a piece, not the arena. That is more to allocate for each, between what comes and goes
            while models are read: their memory then grew by what was read.
    """

    def __init__(self, *, apart: bool = False) -> None:
        self._apart, self._lock = apart, threading.Lock()
        self._piece: Callable[[], mmap.mmap | None] = lambda: None  # the one that is being filled
        self._whole, self._used = torch.empty(0, dtype=torch.uint8), 0

    def room(self, size: int) -> Tensor:
        """Uninitialized bytes, uint8 ``[size]``."""
        if not size:
            return torch.empty(0, dtype=torch.uint8)
        with self._lock:
            piece, start = self._piece(), -(-self._used // LINE) * LINE
            if piece is None or start + size > len(piece):
                try:
                    piece, start = map_memory(-(-size // PIECE) * PIECE), 0
                except (OSError, ValueError):  # no such memory
                    return torch.empty(size, dtype=torch.uint8)
                self._piece = weakref.ref(piece)
                self._whole = self._whole if self._apart else torch.frombuffer(piece, dtype=torch.uint8)
            self._used = start + size
            if self._apart:
                return torch.frombuffer(piece, dtype=torch.uint8, count=size, offset=start)
            return self._whole[start : start + size]

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor``, contiguous."""
        place = self.room(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor.detach())


def shared_room(size: int) -> Tensor:
    """Room for an operand of which nobody knows what it will stay with."""
    return torch.empty(size, dtype=torch.uint8) if size < SMALLEST else _shared.room(size)


_shared = Arena(apart=True)
