"""Windows: every token is in one, in order; what is left out is counted."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.evaluation.windows import cut_text


@given(st.integers(2, 400), st.integers(2, 50), st.one_of(st.none(), st.integers(2, 500)))
def test_windows_are_the_text_in_order(length: int, seqlen: int, limit: int | None) -> None:
    ids = torch.arange(length)
    cut = cut_text(ids, seqlen=seqlen, source="it", max_tokens=limit)
    asked = min(length, limit or length)
    whole = torch.cat(list(cut.windows))
    assert torch.equal(whole, ids[: len(whole)]) and cut.used == len(whole) and cut.available == length
    assert asked - cut.used == (1 if asked % seqlen == 1 else 0)  # one token alone cannot be predicted
    assert all(len(window) == seqlen for window in cut.windows[:-1]) and 2 <= len(cut.windows[-1]) <= seqlen
    assert cut.predicted == sum(len(window) - 1 for window in cut.windows)


@given(st.integers(2, 400), st.integers(2, 50), st.one_of(st.none(), st.integers(2, 500)))
def test_a_first_token_begins_every_window_and_is_none_of_the_text(length: int, seqlen: int, limit: int | None) -> None:
    ids = torch.arange(1, length + 1)
    cut = cut_text(ids, seqlen=seqlen, source="it", max_tokens=limit, start=0)
    used = min(length, limit or length)
    assert all(int(window[0]) == 0 and 2 <= len(window) <= seqlen for window in cut.windows)
    assert torch.equal(torch.cat([window[1:] for window in cut.windows]), ids[:used])
    assert cut.used == cut.predicted == used and cut.available == length and cut.start == 0


@given(st.integers(2, 200), st.integers(2, 30), st.integers(1, 7))
def test_batches_hold_each_window_once_and_equal_lengths(length: int, seqlen: int, size: int) -> None:
    cut = cut_text(torch.arange(length), seqlen=seqlen, source="it")
    batches = list(cut.batches(size))
    assert [number for batch in batches for number in batch] == list(range(len(cut.windows)))
    assert all(1 <= len(batch) <= size for batch in batches)
    assert all(len({len(cut.windows[number]) for number in batch}) == 1 for batch in batches)


@pytest.mark.parametrize("length", [0, 1])
def test_a_text_without_a_predictable_token_is_refused(length: int) -> None:
    with pytest.raises(BitwrightError, match="BW401") as caught:
        cut_text(torch.arange(length), seqlen=8, source="words.txt")
    assert f"words.txt has {length} tokens" in str(caught.value) and "has 2" in str(caught.value)
    assert caught.value.exit_status == 4


@pytest.mark.parametrize(("seqlen", "limit"), [(1, None), (0, None), (2.0, None), (8, 1), (8, -1), (8, True)])
def test_impossible_numbers_are_refused(seqlen: int, limit: int | None) -> None:
    with pytest.raises(ArgumentError, match="at least 2"):
        cut_text(torch.arange(20), seqlen=seqlen, source="it", max_tokens=limit)
