"""Attention on a paged cache of keys and values, as computed or in codes, and the writing of new ones into it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError
from bitwright.core.kv_codes import is_searched
from bitwright.core.kv_scheme import KVCode
from bitwright.core.kv_search import grids
from bitwright.kernels.gpu import launch, library

__all__ = [
    "AttentionBatch",
    "StoredSide",
    "append",
    "arrange",
    "attend",
    "choose_split",
    "refuse_code",
    "stored_side",
    "turn",
]

FEW_QUERIES = 16  # rows of a product of the matrix units; up to so many, the context is split among programs
MANY_QUERIES = 64
TILE = 64  # parts of a context are of whole multiples of so many tokens
FIXED_SPLIT = 512  # tokens, where the order of sums must not depend on the batch
LEAST_SPLIT = 128
TOGETHER = 32  # parts of a context that are put together at a time: one after the other they would wait for memory
WAVES = 4
MOST_PARTS = 1 << 28  # bytes of unfinished parts of contexts at a time


@dataclass(frozen=True, slots=True)
class StoredSide:
    """Keys, or values, of one layer as a cache stores them.

    Attributes:
        data: ``[pages, kv_heads, page, head_dim]``, or codes uint8 ``[pages, kv_heads, page, head_dim * bits / 8]``.
        scales: float32 ``[pages, kv_heads, page, 1 or 2]`` (scale, offset); of calibrated codes ``[kv_heads, 2]``.
        kind: ``float``, ``unsigned`` (codes above an offset), ``signed`` or ``fp8``.
        bits: of a code; 16 for numbers.
        static: whether the scale is calibrated.
        searched: whether what is written takes the best of several grids (:mod:`bitwright.core.kv_search`).
    """

    data: Tensor
    scales: Tensor
    kind: str
    bits: int
    static: bool
    searched: bool = False


@dataclass(frozen=True, slots=True)
class AttentionBatch:
    """Which queries belong to whom: int32 tensors on the GPU.

    Attributes:
        blocks: ``[blocks, 2]``: a sequence, and the first of its (token, query head of a group) rows that a block has.
        starts: ``[sequences + 1]``: where each sequence's tokens begin among the queries.
        lengths: ``[sequences]``: of the context, the new tokens included.
        pages: ``[sequences, most]``: the page table.
        block_rows: rows of a block, a power of two of at least 16.
        longest: an upper bound of the lengths.
    """

    blocks: Tensor
    starts: Tensor
    lengths: Tensor
    pages: Tensor
    block_rows: int
    longest: int


def refuse_code(code: KVCode) -> str | None:
    """Why attention cannot read codes of this kind here, or ``None``."""
    reasons = (
        (code.grain == "channel", "one scale for a channel of several tokens"),
        (code.group != 0, "several scales for one head"),
        (code.bits == 2, "2 bits"),
    )
    return next((reason for applies, reason in reasons if applies), None)


def stored_side(code: KVCode, data: Tensor, scales: Tensor | None = None) -> StoredSide:
    """A side of a cache whose tokens are stored as ``code`` says. Rotated codes are read and written as they are: the
    caller rotates keys, queries and values, and undoes it on the output.

    Raises:
        ArgumentError: BW201 if :func:`refuse_code` says why they cannot be read, or heads are small and odd.
    """
    reason = refuse_code(code)
    if reason is not None:
        what = f"no GPU attention on {code.name} codes: {reason}"
        raise ArgumentError("BW201", what, suggestion="a cache of one scale for each token and head: int8, int4")
    if code.is_float:
        return StoredSide(data, data, "float", 16, False)
    assert scales is not None
    signed, head_dim = code.symmetric or code.is_static, data.shape[-1] * 8 // code.bits
    kind = "fp8" if code.kind == "fp8" else "signed" if signed else "unsigned"
    searched = is_searched(code, head_dim)
    if searched and head_dim % 2:
        what = f"no GPU attention on {code.name} codes of heads of {head_dim} numbers: they are searched in pairs"
        raise ArgumentError("BW201", what, suggestion="a cache of 'none', or the processor")
    return StoredSide(data, scales, kind, code.bits, code.is_static, searched)


def arrange(starts: list[int], group: int, *, few: bool = False) -> tuple[list[tuple[int, int]], int]:
    """Blocks of rows, ``(sequence, first row)``, and how many rows each has.

    Sequences' tokens begin at ``starts``, whose last entry is the end; ``group`` query heads read one head of keys.
    ``few``: a few rows a block, also of long prompts.
    """
    most = max((stop - start for start, stop in pairwise(starts)), default=0) * group
    rows = MANY_QUERIES if most > FEW_QUERIES and not few else FEW_QUERIES
    if group > rows:
        rows = 1 << (group - 1).bit_length()
    blocks = [
        (sequence, first)
        for sequence, (start, stop) in enumerate(pairwise(starts))
        for first in range(0, (stop - start) * group, rows)
    ]
    return blocks, rows


def choose_split(batch: AttentionBatch, kv_heads: int, processors: int, *, invariant: bool = False) -> int:
    """How many tokens of a context one program goes over, a multiple of ``TILE``.

    Long prompts keep the GPU busy by themselves. For a few queries the context is cut so that there are enough
    programs; with ``invariant`` always alike, whatever else is in the batch.
    """
    if invariant:
        return FIXED_SPLIT
    programs = batch.blocks.shape[0] * kv_heads
    wanted = max(1, WAVES * processors // max(1, programs))
    if batch.block_rows > FEW_QUERIES or wanted == 1:
        return -(-batch.longest // TILE) * TILE
    return max(LEAST_SPLIT, -(-batch.longest // (wanted * TILE)) * TILE)


def attend(q: Tensor, keys: StoredSide, values: StoredSide, batch: AttentionBatch, *, window: int = 0,
           factor: float | None = None, split: int | None = None, invariant: bool = False,
           chosen: launch.AttentionLaunch | None = None) -> Tensor:  # fmt: skip
    """Causal attention of ``q`` (``[tokens, heads, head_dim]``, contiguous) on the cache: same shape and dtype.

    ``window``: how many positions a token sees, itself included (0: all). ``factor`` multiplies the products,
    ``head_dim ** -0.5`` unless given. ``split`` overrides :func:`choose_split`, ``chosen`` the launch.
    """
    out = torch.empty_like(q)
    tokens, heads, head_dim = q.shape
    if not tokens:
        return out
    kv_heads, page = keys.data.shape[1:3]
    facts = library.describe(q.device)
    split = split or choose_split(batch, kv_heads, facts.processors, invariant=invariant)
    bits = min(keys.bits, values.bits)
    plan = chosen or launch.launch_attention(
        block_rows=batch.block_rows, bits=bits, facts=facts, itemsize=q.element_size(), head_dim=head_dim
    )
    splits = max(1, -(-batch.longest // split))
    partial, each = splits > 1, kv_heads * splits * batch.block_rows
    # Blocks whose unfinished parts fit into the room for them: contexts that are cut always alike make many.
    together = max(2, MOST_PARTS // (4 * each * (head_dim + 2)) // 2 * 2) if partial else max(1, batch.blocks.shape[0])
    size = (min(together, batch.blocks.shape[0]), kv_heads, splits, batch.block_rows)
    parts = torch.empty(*size, head_dim, dtype=torch.float32, device=q.device) if partial else out
    statistics = torch.empty(*size, 2, dtype=torch.float32, device=q.device) if partial else q
    shape: dict[str, Any] = {"GROUP": heads // kv_heads, "HEAD": head_dim, "WIDTH": _width(head_dim)}
    shape |= {"BLOCK_Q": batch.block_rows, "enable_fp_fusion": True}
    module = library.program("attention")
    for blocks in torch.split(batch.blocks, together):
        module.attend[(blocks.shape[0], kv_heads, splits)](
            q, keys.data, keys.scales, values.data, values.scales, batch.pages, blocks, batch.starts, batch.lengths,
            parts, statistics, (head_dim**-0.5 if factor is None else factor) * math.log2(math.e), kv_heads,
            batch.pages.shape[1], window or 1 << 30, split, PAGE=page,
            KEY_KIND=keys.kind, KEY_BITS=keys.bits, KEY_STATIC=keys.static,
            VALUE_KIND=values.kind, VALUE_BITS=values.bits, VALUE_STATIC=values.static,
            BLOCK_T=plan.tile, PARTIAL=partial, num_warps=plan.warps, num_stages=plan.stages, **shape,
        )  # fmt: skip
        if partial:
            module.combine[(blocks.shape[0], kv_heads, batch.block_rows)](
                parts, statistics, blocks, batch.starts, batch.lengths, out, kv_heads, splits, split,
                TOGETHER=TOGETHER, num_warps=4, num_stages=1, **shape,
            )  # fmt: skip
    return out


def append(keys: Tensor, values: Tensor, pages: Tensor, offsets: Tensor, key_side: StoredSide, value_side: StoredSide,
           turns: tuple[Tensor, Tensor] | None = None) -> None:  # fmt: skip
    """Write new tokens, a row each (``[tokens, kv_heads, head_dim]``, heads contiguous), at ``offsets`` in ``pages``
    (int32 ``[tokens]``; a page below 0: nowhere), in codes of their own where the sides have codes.

    ``turns``: cosines and sines of each row's position, float32 ``[tokens, head_dim / 2]``, by which keys are turned
    first, in float32. A number that is not finite makes the scale of its token and head NaN.
    """
    tokens, kv_heads, head_dim = keys.shape
    if not tokens:
        return
    cosine, sine = (keys, keys) if turns is None else turns
    key_table, key_grids = _grid_table(key_side, keys.device) if key_side.searched else (keys, 0)
    value_table, value_grids = _grid_table(value_side, keys.device) if value_side.searched else (keys, 0)
    library.program("append").append[(tokens, kv_heads)](
        keys, values, cosine, sine, pages, offsets, key_side.data, key_side.scales, value_side.data, value_side.scales,
        key_table, value_table, kv_heads, keys.stride(0), values.stride(0), key_side.data.shape[2],
        HEAD=head_dim, WIDTH=_width(head_dim),
        KEY_KIND=key_side.kind, KEY_BITS=key_side.bits, VALUE_KIND=value_side.kind, VALUE_BITS=value_side.bits,
        KEY_STATIC=key_side.static, VALUE_STATIC=value_side.static, KEY_GRIDS=key_grids, VALUE_GRIDS=value_grids,
        TURNED=turns is not None,
        num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def turn(q: Tensor, turns: tuple[Tensor, Tensor]) -> Tensor:
    """Queries (``[tokens, heads, head_dim]``, heads contiguous) turned by their positions, contiguous, same dtype."""
    y = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.shape[0]:
        library.program("append").turn[(q.shape[0], q.shape[1])](
            q, *turns, y, q.stride(0), HEAD=q.shape[2], WIDTH=_width(q.shape[2]), num_warps=1, enable_fp_fusion=False
        )
    return y


def _grid_table(side: StoredSide, device: torch.device) -> tuple[Tensor, int]:
    """Offset and factor of every grid of a side's codes, and how many there are."""
    code_max = (1 << side.bits) - 1
    return _grids_on(code_max, device), len(grids(code_max))


@cache
def _grids_on(code_max: int, device: torch.device) -> Tensor:
    """On the device once: a graph cannot record its copying."""
    return torch.tensor(grids(code_max), dtype=torch.float64).to(device, torch.float32)


def _width(head_dim: int) -> int:
    """The power of two that a head is padded to; half of it is still wide enough for a product."""
    return max(32, 1 << (head_dim - 1).bit_length())
