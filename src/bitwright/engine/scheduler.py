"""Which tokens of which requests the next step computes.

Whoever came first is served first: first the next token of every running request, then pieces of prompts, then new
requests, as long as there is room. Where there is none, the request that came last gives up its pages and waits; what
it has is computed again later, bit for bit. The oldest request therefore always gets on.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bitwright.engine.pages import PageAllocator
from bitwright.engine.request import Request
from bitwright.models.paged_cache import PAGE

__all__ = ["Scheduler", "Work", "pages_of"]

RESERVE = 4  # so many running requests share one page that is not given to new ones
Drafter = Callable[[Sequence[int], int], list[int]]


def pages_of(tokens: int) -> int:
    """How many pages so many tokens take."""
    return -(-tokens // PAGE)


@dataclass(frozen=True, slots=True)
class Work:
    """The part of one request in a step: its next ``count`` tokens, and after the last of them guessed ones."""

    request: Request
    count: int
    draft: tuple[int, ...] = ()

    @property
    def wants_token(self) -> bool:
        """Whether the step ends with the last token of the request, so that the next one can be chosen."""
        return self.request.computed + self.count == len(self.request.tokens)


class Scheduler:
    """Plans steps.

    Args:
        allocator: of the cache's pages.
        max_batch: how many requests run at once.
        step_tokens: how many tokens a step computes, guessed ones aside. (:meth:`limit` can lower both.)
        draft: guesses at most so many tokens that follow the given ones; ``None`` for no guesses.
        most_drafted: how many are guessed for one request.
    """

    def __init__(
        self,
        allocator: PageAllocator,
        *,
        max_batch: int,
        step_tokens: int,
        draft: Drafter | None = None,
        most_drafted: int = 0,
    ) -> None:
        self._allocator, self._most = allocator, (max_batch, step_tokens)
        self.batch, self.step_tokens = max_batch, step_tokens
        self._draft, self._most_drafted = draft, most_drafted
        self.running: list[Request] = []  # both lists: oldest first
        self.waiting: list[Request] = []
        self.preemptions = 0

    @property
    def requests(self) -> list[Request]:
        return [*self.running, *self.waiting]

    def add(self, request: Request) -> None:
        """Take up a request."""
        insort(self.waiting, request, key=lambda each: each.number)

    def remove(self, request: Request) -> None:
        """Drop a request, and what it has of the cache."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._give_up(request)

    def limit(self, *, batch: int | None = None, step_tokens: int | None = None, drafted: int | None = None) -> None:
        """Let steps be of at most so many requests, tokens and guesses, never more than was asked for at first.

        Requests beyond that give up their pages and wait, those that came last first.
        """
        self.batch = self.batch if batch is None else min(batch, self._most[0])
        self.step_tokens = self.step_tokens if step_tokens is None else min(step_tokens, self._most[1])
        self._most_drafted = self._most_drafted if drafted is None else drafted
        while len(self.running) > self.batch:
            self._preempt(self.running[-1])

    def plan(self) -> list[Work]:
        """The parts of the next step; empty if there is nothing to do."""
        before, budget = self.preemptions, self.step_tokens
        works: dict[Request, Work] = {}
        # Next tokens before pieces of prompts, so that a long prompt delays no answer by more than a step.
        for request in sorted(self.running, key=lambda each: len(each.tokens) - each.computed > 1):
            count = min(len(request.tokens) - request.computed, budget)
            if count and request in self.running and self._make_room(request, count, works):
                works[request] = Work(request, count)
                budget -= count
        if self.preemptions == before:
            self._admit(works, budget)
        return [self._with_draft(work) for work in works.values()]

    def _make_room(self, request: Request, count: int, works: dict[Request, Work]) -> bool:
        """Pages for ``count`` more tokens, those of the newest request if need be; ``False`` if that is this one."""
        missing = pages_of(request.computed + count) - len(request.pages)
        while missing > 0:
            pages = self._allocator.allocate(missing)
            if pages is not None:
                request.pages += pages
                break
            newest = self.running[-1]
            works.pop(newest, None)
            self._preempt(newest)
            if newest is request:
                return False
        return True

    def _preempt(self, request: Request) -> None:
        self.running.remove(request)
        self._give_up(request)
        request.preemptions += 1
        self.preemptions += 1
        self.add(request)

    def _give_up(self, request: Request) -> None:
        self._allocator.release(request.pages)
        request.pages, request.computed = [], 0

    def _admit(self, works: dict[Request, Work], budget: int) -> None:
        """Begin waiting requests in their order, with room for all of their tokens and some for those that run."""
        while self.waiting and budget > 0 and len(self.running) < self.batch:
            request = self.waiting[0]
            hashes = request.hash_pages(self._allocator.salt)
            found = self._allocator.find(hashes, (len(request.tokens) - 1) // PAGE)
            self._allocator.refer(found)
            missing = pages_of(len(request.tokens)) - len(found)
            spare = -(-len(self.running) // RESERVE)  # each may need a page soon, but not all at once
            pages = self._allocator.allocate(missing) if missing + spare <= self._allocator.available else None
            if pages is None:
                self._allocator.release(found)
                return
            request.pages, request.computed = [*found, *pages], len(found) * PAGE
            if request.reused is None:
                request.reused = request.handle.reused_tokens = request.computed
            insort(self.running, self.waiting.pop(0), key=lambda each: each.number)
            count = min(len(request.tokens) - request.computed, budget)
            works[request] = Work(request, count)
            budget -= count

    def _with_draft(self, work: Work) -> Work:
        """Add guesses, if there are any and they need no room that others may want."""
        request = work.request
        most = min(self._most_drafted, request.guesses, request.limit - request.generated - 1)
        if self._draft is None or not work.wants_token or most < 1:
            return work
        draft = self._draft(request.tokens, most)
        missing = pages_of(len(request.tokens) + len(draft)) - len(request.pages)
        if draft and missing > 0:
            pages = (
                self._allocator.allocate(missing) if missing + len(self.running) <= self._allocator.available else None
            )
            if pages is None:
                return work
            request.pages += pages
        return Work(request, work.count, tuple(draft))

    def publish(self, request: Request) -> None:
        """Let the full pages of a request be found by others."""
        keys = request.hash_pages(self._allocator.salt)[: request.computed // PAGE]
        for page, key in zip(request.pages, keys, strict=False):
            self._allocator.publish(page, key)
