"""The memory of a paged cache: none before there is something in it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bitwright.core.kv_scheme import parse_kv
from bitwright.models.paged_cache import PAGE, CacheShape, PagedCache

SHAPE = CacheShape(layers=4, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
STATM = Path("/proc/self/statm")


def resident() -> int:
    return int(STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not STATM.exists(), reason="the system does not say how much memory a process has")
@pytest.mark.parametrize("scheme", ["none", "int8", "k8v4", "fp8"])
def test_pages_are_zero_aligned_and_take_memory_when_they_are_written_to(scheme: str) -> None:
    before = resident()
    cache = PagedCache(SHAPE, 4096, parse_kv(scheme))
    assert resident() - before < 0.1 * cache.bytes()
    parts = [part for kind in (cache.keys, cache.values, cache.key_codes, cache.value_codes, cache.key_scale,
                               cache.value_scale) for part in kind if part.numel()]  # fmt: skip
    for part in parts:
        assert part.data_ptr() % 64 == 0 and part.is_contiguous()
        assert part.shape[:3] == (4096, 2, PAGE)
        assert not part[-1].any()
        part[0] = 1
        assert part[0].all()


def test_a_cache_without_pages_is_empty() -> None:
    assert PagedCache(SHAPE, 0).bytes() == 0
