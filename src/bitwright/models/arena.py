"""Memory for tensors that stay together: large pages, and no holes that freed tensors leave between them."""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.core.memory import use_huge_pages

__all__ = ["ALIGNED", "Arena"]

ALIGNED = 64  # bytes: a vector of the widest instruction set
PIECE = 64 << 20  # bytes taken from the system at a time; what is not written yet takes no memory


class Arena:
    """Gives room to tensors, and never takes it back: the memory is freed when the last of them is."""

    def __init__(self) -> None:
        self._piece, self._used = torch.empty(0, dtype=torch.uint8), 0

    def room(self, size: int) -> Tensor:
        """So many bytes, uint8 ``[size]``."""
        start = -(-self._used // ALIGNED) * ALIGNED
        if start + size > self._piece.numel():
            self._piece, start = use_huge_pages(torch.empty(max(size, PIECE), dtype=torch.uint8)), 0
        self._used = start + size
        return self._piece[start : start + size]

    def keep(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor``, contiguous."""
        place = self.room(tensor.nbytes).view(tensor.dtype).view(tensor.shape)
        return place.copy_(tensor.detach())
