"""How codes lie in 32-bit words on a GPU, so that loads are wide and unpacking needs no exchange between threads.

Columns are cut into runs of 16 or 32. Word ``j`` of a row holds the codes of column ``j`` of several runs, so that the
words of one run, masked and shifted alike, are ``run`` neighbouring columns, in the order in which the activations lie.
Two runs leave a word at once, one in each half of it. A width is the sum of powers of two (3 bits: 2 and 1), whose
words lie side by side. The words of one chunk of columns of neighbouring rows are neighbours in memory: a tile of 64
rows and 4 bits is 8 KB without a gap.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["WordLayout", "join_codes", "order_columns", "split_codes", "word_layout"]

WORD = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class WordLayout:
    """The layout of one width.

    Attributes:
        bits: of a code.
        parts: the powers of two that ``bits`` is the sum of, greatest first; the first holds the lowest bits.
        run: columns that leave the words together.
        chunk: columns whose words lie together: ``run`` times the codes in a word of the smallest part.
    """

    bits: int
    parts: tuple[int, ...]
    run: int
    chunk: int

    @property
    def words(self) -> int:
        """Words of a row's chunk."""
        return self.chunk * self.bits // WORD

    def part_start(self, part: int) -> int:
        """The first word of a part within a chunk."""
        return sum(self.chunk * width // WORD for width in self.parts[:part])

    def place(self, part: int, run: int) -> tuple[int, int]:
        """Where a run's codes of a part lie: number of its words' run within the part, lowest bit within the word."""
        width = self.parts[part]
        per_word = WORD // width
        number, slot = divmod(run, per_word)
        return number, width * (slot // 2) + WORD // 2 * (slot % 2)


@cache
def word_layout(bits: int) -> WordLayout:
    """The layout for codes of ``bits`` bits, 1 to 8."""
    parts = tuple(width for width in (8, 4, 2, 1) if bits & width)
    run = 16 if len(parts) > 1 or bits == 1 else 32  # the smaller, the less padding at the end of a row
    return WordLayout(bits=bits, parts=parts, run=run, chunk=run * WORD // parts[-1])


def join_codes(codes: Tensor, layout: WordLayout) -> Tensor:
    """Codes (uint8 ``[rows, columns]``, below ``2**bits``) as int32 words ``[chunks, rows, words]``.

    The last chunk is filled up with zeros.
    """
    rows, columns = codes.shape
    padded = functional.pad(codes, (0, -columns % layout.chunk))
    runs = padded.view(rows, -1, layout.chunk // layout.run, layout.run)
    words = torch.zeros(rows, runs.shape[1], layout.words, dtype=torch.int32, device=codes.device)
    taken = 0
    for part, width in enumerate(layout.parts):
        start = layout.part_start(part)
        for run in range(runs.shape[2]):
            number, bit = layout.place(part, run)
            first = start + number * layout.run
            bits = (runs[:, :, run] >> taken) & ((1 << width) - 1)
            words[:, :, first : first + layout.run] |= bits.to(torch.int32) << bit
        taken += width
    return words.transpose(0, 1).contiguous()


def split_codes(words: Tensor, layout: WordLayout, columns: int) -> Tensor:
    """The inverse of :func:`join_codes`: uint8 ``[rows, columns]``."""
    chunks, rows, _ = words.shape
    codes = torch.zeros(rows, chunks, layout.chunk // layout.run, layout.run, dtype=torch.uint8, device=words.device)
    taken = 0
    for part, width in enumerate(layout.parts):
        start = layout.part_start(part)
        for run in range(codes.shape[2]):
            number, bit = layout.place(part, run)
            first = start + number * layout.run
            bits = (words[:, :, first : first + layout.run] >> bit) & ((1 << width) - 1)
            codes[:, :, run] |= bits.transpose(0, 1).to(torch.uint8) << taken
        taken += width
    return codes.view(rows, -1)[:, :columns].contiguous()


def order_columns(group_index: Tensor, groups: int, run: int) -> Tensor:
    """The column of each slot, or -1: int32 ``[slots]``.

    Groups lie one after the other, each with as many slots as the largest needs, a multiple of ``run``.
    """
    index = group_index.long()
    counts = torch.bincount(index, minlength=groups)
    size = -(-int(counts.max()) // run) * run
    columns = torch.argsort(index, stable=True)
    place = torch.arange(columns.numel(), device=index.device) - (counts.cumsum(0) - counts)[index[columns]]
    order = torch.full((groups * size,), -1, dtype=torch.int32, device=index.device)
    order[index[columns] * size + place] = columns.to(torch.int32)
    return order
