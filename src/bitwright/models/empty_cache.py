"""What observers of keys and values build on: a cache that is empty, however much it was given."""

from __future__ import annotations

from bitwright.models.hf import Cache

__all__ = ["EmptyCache"]


class EmptyCache(Cache):
    """Stands in for the cache of an empty context. Who inherits says what ``update`` does with what comes."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1
