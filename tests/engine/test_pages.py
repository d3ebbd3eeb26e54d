"""No page is lost, none is had twice, and equal beginnings are found."""

from __future__ import annotations

import random

import pytest

from bitwright.engine.pages import PageAllocator, page_hashes
from bitwright.models.paged_cache import PAGE


def text(seed: int, pages: int) -> list[int]:
    return random.Random(seed).choices(range(100), k=pages * PAGE)


def filled(allocator: PageAllocator, tokens: list[int]) -> list[int]:
    """The pages of ``tokens``, found or new, as a request would come to have them."""
    hashes = page_hashes(tokens, allocator.salt)
    pages = allocator.find(hashes, len(hashes))
    allocator.refer(pages)
    rest = allocator.allocate(len(hashes) - len(pages))
    assert rest is not None
    pages = [*pages, *rest]
    for page, key in zip(pages, hashes, strict=True):
        allocator.publish(page, key)
    return pages


def test_equal_beginnings_share_pages() -> None:
    allocator = PageAllocator(10)
    first = filled(allocator, text(1, 3))
    again = filled(allocator, text(1, 3) + text(2, 1))
    assert again[:3] == first and allocator.used == 4
    other = filled(allocator, text(2, 1) + text(1, 3))  # equal pages after another beginning are others
    assert not set(other) & set(again)
    for pages in (first, again, other):
        allocator.release(pages)
    allocator.check()
    assert allocator.used == 0 and allocator.available == 10


def test_the_least_recently_used_end_goes_first() -> None:
    allocator = PageAllocator(4)
    old, new = filled(allocator, text(1, 2)), filled(allocator, text(2, 2))
    allocator.release(old)
    allocator.release(new)
    assert allocator.allocate(1) == [old[1]]
    assert allocator.find(page_hashes(text(1, 2), allocator.salt), 9) == [old[0]]
    assert allocator.find(page_hashes(text(2, 2), allocator.salt), 9) == new
    assert allocator.allocate(4) is None
    allocator.check()


def test_time_is_up() -> None:
    now = [0.0]
    allocator = PageAllocator(4, ttl=10.0, clock=lambda: now[0])
    hashes = page_hashes(text(1, 2), allocator.salt)
    allocator.release(filled(allocator, text(1, 2)))
    now[0] = 9.0
    assert len(allocator.find(hashes, 9)) == 2
    now[0] = 10.0
    assert allocator.find(hashes, 9) == [] and allocator.known == 0
    allocator.check()


def test_units_of_reuse() -> None:
    tokens, allocator = text(1, 9), PageAllocator(20, reuse=4 * PAGE)
    filled(allocator, tokens)
    assert len(allocator.find(page_hashes(tokens, allocator.salt), 9)) == 8
    assert len(allocator.find(page_hashes(tokens, allocator.salt), 7)) == 4
    none = PageAllocator(20, reuse=0)
    filled(none, tokens)
    assert none.find(page_hashes(tokens, none.salt), 9) == []


def test_a_page_is_released_once() -> None:
    allocator = PageAllocator(2)
    pages = allocator.allocate(1)
    assert pages is not None
    allocator.release(pages)
    with pytest.raises(AssertionError, match="twice"):
        allocator.release(pages)


@pytest.mark.parametrize("seed", range(5))
def test_any_order_of_events_keeps_the_books(seed: int) -> None:
    chance, now = random.Random(seed), [0.0]
    allocator = PageAllocator(12, ttl=5.0, clock=lambda: now[0])
    held: list[tuple[list[int], list[int]]] = []
    for _ in range(400):
        now[0] += chance.random()
        tokens = text(chance.randrange(3), chance.randrange(1, 4)) + text(chance.randrange(9), 1)
        if chance.random() < 0.5 and allocator.available >= len(tokens) // PAGE:
            held.append((tokens, filled(allocator, tokens)))
        elif held:
            tokens, pages = held.pop(chance.randrange(len(held)))
            if chance.random() < 0.2:
                allocator.forget(allocator.unshared(pages))
            allocator.release(pages)
        allocator.check()
        keys = {page: tokens[: (at + 1) * PAGE] for tokens, pages in held for at, page in enumerate(pages)}
        assert all(tokens[: (at + 1) * PAGE] == keys[page] for tokens, ps in held for at, page in enumerate(ps))
        assert allocator.used == len(keys)
    for _, pages in held:
        allocator.release(pages)
    assert allocator.used == 0
