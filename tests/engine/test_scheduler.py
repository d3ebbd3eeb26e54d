"""Who is begun when: plans of a scheduler without a model."""

from __future__ import annotations

import pytest

from bitwright.engine.answer_text import AnswerText
from bitwright.engine.handle import RequestHandle
from bitwright.engine.options import RequestOptions
from bitwright.engine.pages import PageAllocator
from bitwright.engine.request import Request
from bitwright.engine.sampler import Sampler
from bitwright.engine.scheduler import RESERVE, Scheduler
from bitwright.models.paged_cache import PAGE


def request(number: int, tokens: int, limit: int = 100) -> Request:
    options, prompt = RequestOptions(), [number] * tokens
    return Request(
        handle=RequestHandle(number, lambda _: None), options=options, tokens=prompt, prompt_length=tokens, limit=limit,
        seed=0, ends=frozenset(), sampler=Sampler(options, prompt, 0), text=AnswerText(None, [], ()),
    )  # fmt: skip


@pytest.mark.parametrize(("left", "is_begun"), [(2, False), (3, True)])
def test_a_new_request_leaves_a_page_to_those_that_run(left: int, is_begun: bool) -> None:
    """One for every four of them: else the first that fills its page would send the new one away again."""
    running = RESERVE
    allocator = PageAllocator(running + left, reuse=0)
    scheduler = Scheduler(allocator, max_batch=16, step_tokens=10**6)
    for number in range(running):
        scheduler.add(request(number, PAGE - 1))
    assert len(scheduler.plan()) == running
    for each in scheduler.running:
        each.computed = PAGE - 2
    scheduler.add(request(running, 2 * PAGE))
    works = scheduler.plan()
    assert (len(works) == running + 1) == is_begun and scheduler.preemptions == 0


def test_guesses_take_no_room_that_others_may_want() -> None:
    """A page for guesses is had only while there is one for each that runs."""
    for count, is_drafted in ((4, False), (5, True)):
        allocator = PageAllocator(count, reuse=0)
        scheduler = Scheduler(
            allocator, max_batch=16, step_tokens=64, draft=lambda tokens, most: [1] * most, most_drafted=4
        )
        for number in range(2):
            new = request(number, PAGE - number)
            new.guesses = 0
            scheduler.add(new)
            scheduler.plan()
        for each in scheduler.running:
            each.computed = len(each.tokens) - 1
            each.guesses = 4
        drafted = [work.draft for work in scheduler.plan() if work.request.number == 0]
        assert bool(drafted[0]) == is_drafted, count
        allocator.check()


def test_a_page_is_found_only_when_its_last_token_is_computed() -> None:
    allocator = PageAllocator(8)
    scheduler = Scheduler(allocator, max_batch=4, step_tokens=64)
    first = request(0, PAGE)
    scheduler.add(first)
    scheduler.plan()
    keys = first.hash_pages(allocator.salt)
    for computed, count in ((PAGE - 1, 0), (PAGE, 1)):
        first.computed = computed
        scheduler.publish(first)
        assert len(allocator.find(keys, 1)) == count


def test_no_more_is_guessed_than_may_be_generated() -> None:
    scheduler = Scheduler(
        PageAllocator(8, reuse=0), max_batch=4, step_tokens=64, draft=lambda tokens, most: [1] * most, most_drafted=8
    )
    last = request(0, 5, limit=3)
    last.guesses = 8
    scheduler.add(last)
    assert [len(work.draft) for work in scheduler.plan()] == [2]


def test_next_tokens_go_before_pieces_of_prompts() -> None:
    """Also where the long prompt came first."""
    scheduler = Scheduler(PageAllocator(64, reuse=0), max_batch=4, step_tokens=240)
    long, short = request(0, 200), request(1, 3)
    for each in (long, short):
        scheduler.add(each)
    assert [(work.request.number, work.count) for work in scheduler.plan()] == [(0, 200), (1, 3)]
    long.computed, short.computed = 40, 2
    assert [(work.request.number, work.count) for work in scheduler.plan()] == [(1, 1), (0, 160)]
