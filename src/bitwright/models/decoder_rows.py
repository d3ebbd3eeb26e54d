"""A step as the GPU reads it: all its numbers int32, side by side in one tensor, so that one copy brings them all."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from bitwright.kernels.gpu import attention
from bitwright.models.decoder import Step
from bitwright.models.paged_cache import PAGE

__all__ = ["Layout", "Rows", "decode_rows", "read_rows", "stage", "step_rows"]

ALIGNED = 4  # numbers: every part begins at 16 bytes, which programs are compiled for
PARTS = ("tokens", "positions", "pages", "offsets", "starts", "lengths", "table", "blocks", "outputs")


@dataclass(frozen=True, slots=True)
class Rows:
    """Int32 tensors: ``tokens``, ``positions``, and where each row is written (``pages``, ``offsets``), ``[n]``;
    ``starts``, ``lengths``, ``table`` and ``blocks`` as :class:`bitwright.kernels.gpu.attention.AttentionBatch` has
    them (with its ``block_rows`` and ``longest``); ``outputs``: rows that want logits."""

    tokens: Tensor
    positions: Tensor
    pages: Tensor
    offsets: Tensor
    starts: Tensor
    lengths: Tensor
    table: Tensor
    blocks: Tensor
    outputs: Tensor
    block_rows: int
    longest: int


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each part of some rows lies in one tensor, and its shape."""

    places: tuple[tuple[int, tuple[int, ...]], ...]
    size: int
    block_rows: int
    longest: int


def step_rows(step: Step, group: int, *, few: bool = False) -> Rows:
    """The rows of any step; ``group`` query heads read one head of keys. ``few``: blocks of few queries alone."""
    blocks, block_rows = attention.arrange(step.starts.tolist(), group, few=few)
    counts = (step.starts[1:] - step.starts[:-1]).long()
    sequences = torch.repeat_interleave(torch.arange(len(counts)), counts)
    pages = step.pages[sequences, step.positions.long() // PAGE]
    return Rows(
        step.tokens.to(torch.int32), step.positions, pages, step.positions % PAGE, step.starts, step.lengths,
        step.pages, torch.tensor(blocks, dtype=torch.int32).view(-1, 2), step.outputs, block_rows,
        int(step.lengths.max()),
    )  # fmt: skip


def decode_rows(step: Step, size: int, context: int) -> Rows:
    """The rows of a step of single tokens, padded to ``size`` sequences of up to ``context`` tokens.

    Sequences of the padding have no context, and are written nowhere.
    """
    count, most = len(step.lengths), context // PAGE
    table = torch.zeros(size, most, dtype=torch.int32)
    width = min(most, step.pages.shape[1])
    table[:count, :width] = step.pages[:, :width]
    pages = torch.full((size,), -1, dtype=torch.int32)
    pages[:count] = step.pages[torch.arange(count), step.positions.long() // PAGE]
    every = torch.arange(size, dtype=torch.int32)
    return Rows(
        _padded(step.tokens, size), _padded(step.positions, size), pages, _padded(step.positions % PAGE, size),
        torch.arange(size + 1, dtype=torch.int32), _padded(step.lengths, size), table,
        torch.stack([every, torch.zeros_like(every)], dim=1), every, attention.FEW_QUERIES, context,
    )  # fmt: skip


def stage(rows: Rows, *, pinned: bool, into: Tensor | None = None) -> tuple[Layout, Tensor]:
    """All parts in one int32 tensor on the CPU, in pinned memory if asked for, and where they lie."""
    parts = [getattr(rows, name) for name in PARTS]
    places, first = [], 0
    for part in parts:
        places.append((first, tuple(part.shape)))
        first += -(-part.numel() // ALIGNED) * ALIGNED
    host = torch.empty(first, dtype=torch.int32, pin_memory=pinned) if into is None else into
    for part, (start, _) in zip(parts, places, strict=True):
        host[start : start + part.numel()] = part.reshape(-1)
    return Layout(tuple(places), first, rows.block_rows, rows.longest), host


def read_rows(layout: Layout, numbers: Tensor) -> Rows:
    """The parts again, as views of ``numbers``."""
    views = []
    for start, shape in layout.places:
        count = 1
        for each in shape:
            count *= each
        views.append(numbers[start : start + count].view(shape))
    parts: dict[str, Any] = {field.name: view for field, view in zip(fields(Rows), views, strict=False)}
    return Rows(**parts, block_rows=layout.block_rows, longest=layout.longest)


def _padded(numbers: Tensor, size: int) -> Tensor:
    padded = torch.zeros(size, dtype=torch.int32)
    padded[: len(numbers)] = numbers
    return padded
