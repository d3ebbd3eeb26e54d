"""Which page of the cache belongs to whom: counted references, reuse of equal beginnings, the oldest given up first.

A page is known by a hash of its tokens and of the hash of the page before, so that equal hashes mean equal texts from
the start. A page that nobody refers to stays until its room is needed, or its time is over.
"""

from __future__ import annotations

import hashlib
import os
import time
from array import array
from collections import OrderedDict
from collections.abc import Callable, Sequence

from bitwright.models.paged_cache import PAGE

__all__ = ["PageAllocator", "page_hashes"]


def page_hashes(tokens: Sequence[int], salt: bytes, before: bytes = b"") -> list[bytes]:
    """The hash of each full page of ``tokens``, which follow the page with the hash ``before``."""
    hashes = []
    for start in range(0, len(tokens) - PAGE + 1, PAGE):
        content = array("q", tokens[start : start + PAGE]).tobytes()
        before = hashlib.blake2b(before + content, key=salt, digest_size=16).digest()
        hashes.append(before)
    return hashes


class PageAllocator:
    """Hands out the pages ``0 .. count - 1``.

    Args:
        count: of pages.
        reuse: how many tokens are reused at a time, a multiple of a page; 0 to reuse nothing.
        ttl: for how many seconds a page is kept that nobody refers to; ``None`` for as long as there is room.
        clock: seconds.
    """

    def __init__(
        self, count: int, *, reuse: int = PAGE, ttl: float | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.count, self._reuse, self._ttl, self._clock = count, reuse, ttl, clock
        # Nobody can make two texts with equal hashes on purpose without knowing this.
        self.salt = os.urandom(16)
        self._free = list(range(count - 1, -1, -1))
        self._references = [0] * count
        self._hash_of: dict[int, bytes] = {}
        self._page_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, float] = OrderedDict()  # known pages without references, least recent first

    @property
    def available(self) -> int:
        """How many pages can be had: free ones, and known ones that nobody refers to."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """How many pages somebody refers to."""
        return self.count - self.available

    @property
    def known(self) -> int:
        """How many pages are kept for reuse though nobody refers to them."""
        return len(self._idle)

    def find(self, hashes: Sequence[bytes], most: int) -> list[int]:
        """The pages of the longest known beginning, of at most ``most`` pages, in whole units of reuse."""
        self._expire()
        found: list[int] = []
        for key in hashes[:most] if self._reuse else ():
            page = self._page_of.get(key)
            if page is None:
                break
            found.append(page)
        unit = max(1, self._reuse // PAGE)
        return found[: len(found) // unit * unit]

    def refer(self, pages: Sequence[int]) -> None:
        """Add a reference to each of ``pages``, as :meth:`find` gave them."""
        for page in pages:
            self._references[page] += 1
            self._idle.pop(page, None)

    def allocate(self, count: int) -> list[int] | None:
        """``count`` pages with one reference each, or ``None`` if there are not so many."""
        self._expire()
        if count > self.available:
            return None
        pages = []
        for _ in range(count):
            if not self._free:
                self._forget(next(iter(self._idle)))
            page = self._free.pop()
            self._references[page] = 1
            pages.append(page)
        return pages

    def publish(self, page: int, key: bytes) -> None:
        """Let ``page``, which is full and computed, be found; the first page of a text stays the one that is found."""
        if self._reuse and key not in self._page_of and page not in self._hash_of:
            self._page_of[key], self._hash_of[page] = page, key

    def release(self, pages: Sequence[int]) -> None:
        """Take one reference from each page; the last pages of a text are given up before its first."""
        now = self._clock()
        for page in reversed(pages):
            assert self._references[page] > 0, f"page {page} is released twice"
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._hash_of:
                    self._idle[page] = now
                else:
                    self._free.append(page)

    def unshared(self, pages: Sequence[int]) -> list[int]:
        """Those of ``pages`` to which there is one reference."""
        return [page for page in pages if self._references[page] == 1]

    def forget(self, pages: Sequence[int]) -> None:
        """Let ``pages`` not be found any more."""
        for page in pages:
            key = self._hash_of.pop(page, None)
            if key is not None:
                del self._page_of[key]

    def _expire(self) -> None:
        if self._ttl is None:
            return
        bound = self._clock() - self._ttl
        while self._idle:
            page, since = next(iter(self._idle.items()))
            if since > bound:
                break
            self._forget(page)

    def _forget(self, page: int) -> None:
        """Free a known page that nobody refers to."""
        del self._idle[page]
        self.forget([page])
        self._free.append(page)

    def check(self) -> None:
        """Raise AssertionError if a page is lost or counted twice; for tests and after failures."""
        free, idle = set(self._free), set(self._idle)
        assert len(free) == len(self._free) and not free & idle
        assert all((self._references[page] == 0) == (page in free or page in idle) for page in range(self.count))
        assert {page: key for key, page in self._page_of.items()} == self._hash_of
        assert not free & self._hash_of.keys() and idle <= self._hash_of.keys()
