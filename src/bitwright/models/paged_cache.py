"""Keys and values of many sequences in pages of 32 tokens: one object for all layers, which knows no sequence.

Which page belongs to whom is the engine's business; here lie the numbers, and how they are written and read.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PAGE", "CacheShape", "PagedCache"]

PAGE = 32  # tokens of a page


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What a page holds of each token: ``layers`` times keys and values of ``kv_heads`` heads of ``head_dim``."""

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def page_bytes(self, page: int = PAGE) -> int:
        """How many bytes keys and values of ``page`` tokens take in all layers."""
        return 2 * self.layers * self.kv_heads * page * self.head_dim * self.dtype.itemsize


class PagedCache:
    """The storage of ``page_count`` pages.

    Attributes:
        keys, values: for each layer, ``[page_count, kv_heads, page, head_dim]`` of the shape's dtype.
        page: tokens of a page.
    """

    page: int = PAGE

    def __init__(self, shape: CacheShape, page_count: int, device: torch.device | None = None) -> None:
        self.shape, self.page_count = shape, page_count
        size = (page_count, shape.kv_heads, PAGE, shape.head_dim)
        # Zeros: what lies behind the end of a sequence is multiplied by zero, and must be finite for that.
        self.keys = [torch.zeros(size, dtype=shape.dtype, device=device) for _ in range(shape.layers)]
        self.values = [torch.zeros(size, dtype=shape.dtype, device=device) for _ in range(shape.layers)]

    def write(self, layer: int, pages: Tensor, offsets: Tensor, keys: Tensor, values: Tensor) -> None:
        """Put one token a row, ``[n, kv_heads, head_dim]``, at ``offsets [n]`` in ``pages [n]`` (int64)."""
        self.keys[layer][pages, :, offsets] = keys.to(self.shape.dtype)
        self.values[layer][pages, :, offsets] = values.to(self.shape.dtype)

    def read(self, layer: int, page: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a page, float32 ``[kv_heads, page, head_dim]``."""
        return self.keys[layer][page].to(torch.float32), self.values[layer][page].to(torch.float32)

    def clear(self, pages: list[int]) -> None:
        """Set pages to zero, as after a step that made numbers that are not finite."""
        for tensor in (*self.keys, *self.values):
            tensor[pages] = 0

    def bytes(self) -> int:
        """How much memory all pages take."""
        return self.page_count * self.shape.page_bytes()
