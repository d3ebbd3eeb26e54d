"""Words: nothing is lost in them, at any width and length, and neighbours lie where the programs look for them."""

from __future__ import annotations

import pytest
import torch

from bitwright.kernels.gpu.operand import join_codes, order_columns, split_codes, word_layout


@pytest.mark.parametrize("bits", range(1, 9))
def test_splitting_what_was_joined_is_the_identity(bits: int) -> None:
    layout = word_layout(bits)
    for columns in (1, layout.run, layout.chunk - 1, layout.chunk, 2 * layout.chunk + 5):
        codes = torch.randint(0, 1 << bits, (3, columns), dtype=torch.uint8)
        words = join_codes(codes, layout)
        assert words.shape == (-(-columns // layout.chunk), 3, layout.words)
        assert torch.equal(split_codes(words, layout, columns), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_words_hold_nothing_but_codes(bits: int) -> None:
    layout = word_layout(bits)
    assert layout.words * 32 == layout.chunk * bits
    places = {
        (layout.part_start(part) + number * layout.run, bit + offset)
        for part, width in enumerate(layout.parts)
        for run in range(layout.chunk // layout.run)
        for number, bit in [layout.place(part, run)]
        for offset in range(width)
    }
    assert len(places) * layout.run == layout.words * 32


def test_two_neighbouring_runs_are_halves_of_one_word() -> None:
    codes = torch.zeros(1, 256, dtype=torch.uint8)
    codes[0, 3], codes[0, 32 + 3], codes[0, 64 + 3] = 5, 7, 9
    words = join_codes(codes, word_layout(4))
    assert words[0, 0, 3].item() == 5 | 7 << 16 | 9 << 4
    assert words.count_nonzero() == 1


def test_slots_bring_groups_together_and_name_every_column_once() -> None:
    index = torch.tensor([2, 0, 1, 1, 0, 1], dtype=torch.int32)
    order = order_columns(index, 3, 2)
    assert order.view(3, -1).tolist() == [[1, 4, -1, -1], [2, 3, 5, -1], [0, -1, -1, -1]]
