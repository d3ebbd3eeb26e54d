"""The number of threads goes back to what it was."""

from __future__ import annotations

import pytest
import torch

from bitwright.core.threads import thread_count


@pytest.mark.parametrize(("asked", "used"), [(1, 1), (3, 3), (None, 2)])
def test_the_count_lasts_as_long_as_the_context(asked: int | None, used: int) -> None:
    with thread_count(2):
        with pytest.raises(ZeroDivisionError), thread_count(asked):
            assert torch.get_num_threads() == used
            raise ZeroDivisionError
        assert torch.get_num_threads() == 2
