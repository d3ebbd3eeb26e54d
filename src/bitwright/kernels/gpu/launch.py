"""How a product is cut into programs: plain functions of its sizes and of the GPU, and what was tuned, by GPU."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib import resources
from typing import Any

from bitwright.kernels.gpu.library import PROGRAMMED, GpuFacts
from bitwright.kernels.gpu.operand import word_layout

__all__ = [
    "DENSE_INTEGER_ROWS",
    "FEW_ROWS",
    "LARGE_ROWS",
    "SMALL",
    "AttentionLaunch",
    "LinearLaunch",
    "cut_columns",
    "expands",
    "launch_attention",
    "launch_fp8",
    "launch_integer",
    "launch_linear",
    "rows_of",
    "shape_class",
    "shared_bytes",
    "tuned",
]

FEW_ROWS = 16  # up to so many rows a product is bound by reading the weight
LARGE_ROWS = 1024  # from so many rows on, unpacking once and a dense product are faster
DENSE_INTEGER_ROWS = 512  # from so many on, the vendor's int8 product
NARROW = (64, 32)  # the largest tile of 8-bit tokens times 4-bit codes in groups of less than 128
WAVES = 4  # programs per processor that keep its memory busy while the matrix units work
FULL = 2  # of more rows, whose parts cost more to add: so many that no processor is idle
MOST_SPLITS = 16
LEAST_ROWS = 16  # of a tile: fewer no matrix unit takes
WIDE_HEAD = 128  # numbers; the largest of a head whose keys and values are tuned for
WIDE_TILE = 64  # output features of the tiles that a weight's shape is judged by
# The oldest capability of each generation and its entries among the fallbacks, what is said later before what is said
# first; newest generations first. Ada keeps fewer sums in registers than its kin.
GENERATIONS: tuple[tuple[tuple[int, int], tuple[str, ...]], ...] = (
    ((9, 0), ("matrix", "hopper")),
    ((8, 9), ("ada",)),
    ((8, 0), ("matrix",)),
    ((7, 5), ("turing",)),
    ((0, 0), ("volta",)),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLaunch:
    """A tile is ``block_n`` output features by ``block_m`` rows; ``split`` programs share its columns."""

    block_n: int
    block_m: int
    split: int
    warps: int
    stages: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLaunch:
    """``tile`` tokens of keys are multiplied at a time: 32 or 64, so that every part of a context has whole tiles."""

    tile: int
    warps: int
    stages: int


# Of float32, which is multiplied without matrix units, and of wide heads: with more at a time registers are spilled,
# and Turing has not enough shared memory.
SMALL = AttentionLaunch(tile=32, warps=8, stages=1)


@cache
def tuned() -> dict[str, Any]:
    """The table of tuned configurations: GPU name -> kernel -> rows -> fields of a launch, beside ``fallback``."""
    text = (resources.files(__package__) / "tuned.json").read_text(encoding="utf-8")
    table = json.loads(text)
    assert isinstance(table, dict)
    return table


def cut_columns(chunks: int, split: int) -> tuple[int, int]:
    """``split`` as it can be had, and the chunks of each: no program is without any."""
    each = -(-chunks // max(1, min(split, chunks)))
    return -(-chunks // each), each


def expands(rows: int, facts: GpuFacts) -> bool:
    """Whether so many rows are better multiplied by a weight that is unpacked first. Where Triton has no matrix units
    to use, soon; else the unpacking must be small beside the product."""
    return rows >= LARGE_ROWS or (rows > FEW_ROWS and facts.capability < PROGRAMMED)


def launch_linear(
    *, rows: int, out: int, chunks: int, bits: int, itemsize: int, facts: GpuFacts, invariant: bool = False
) -> LinearLaunch:
    """How ``rows`` rows times a weight ``[out, ...]`` of ``chunks`` chunks are computed on a GPU.

    With ``invariant`` the order of sums does not depend on ``rows``: the split is that of one row, and the tile too.
    """
    rows = 1 if invariant else rows
    row = _tuned_row("linear", rows=rows, out=out, bits=bits, facts=facts)
    if itemsize == 4:  # float32 tiles are multiplied without matrix units, from registers
        row |= {"block_n": min(int(row["block_n"]), 32), "block_m": 16}
    row["block_m"], row["stages"] = _fitting(row, bits=bits, itemsize=itemsize, facts=facts)
    return _planned(row, rows=rows, out=out, chunks=chunks, facts=facts)


def shared_bytes(launch: LinearLaunch, *, bits: int, itemsize: int, facts: GpuFacts) -> int:
    """Memory that the programs of a processor share, which the loads in flight of a launch of packed weights take."""
    layout = word_layout(bits)
    words, x = 4 * layout.words * launch.block_n, itemsize * layout.chunk * launch.block_m
    # The matrix units of Hopper read activations from there, so those at work have a place of their own.
    return (launch.stages - 1) * (words + x) + (x if facts.capability >= (9, 0) else 0)


def _fitting(row: dict[str, Any], *, bits: int, itemsize: int, facts: GpuFacts) -> tuple[int, int]:
    """``block_m`` and ``stages`` of a row, smaller where a chunk of columns (512 of 1, 2, 3, 5 and 7 bits) is too long
    for the memory of this GPU."""
    one = LinearLaunch(block_n=int(row["block_n"]), block_m=int(row["block_m"]), split=1, warps=int(row["warps"]),
                       stages=_stages(row, facts))  # fmt: skip
    while shared_bytes(one, bits=bits, itemsize=itemsize, facts=facts) > facts.shared_bytes:
        if one.stages <= 2 and one.block_m == LEAST_ROWS:
            return one.block_m, 1
        one = replace(one, stages=one.stages - 1) if one.stages > 2 else replace(one, block_m=one.block_m // 2)
    return one.block_m, one.stages


def launch_fp8(*, rows: int, out: int, chunks: int, facts: GpuFacts, invariant: bool = False) -> LinearLaunch:
    """How e4m3 tokens times a weight ``[out, ...]`` are computed; ``invariant`` as in :func:`launch_linear`."""
    rows = 1 if invariant else rows
    row = _tuned_row("fp8", rows=rows, out=out, bits=8, facts=facts)
    return _planned(row, rows=rows, out=out, chunks=chunks, facts=facts)


def launch_integer(
    *,
    rows: int,
    out: int,
    chunks: int,
    single: bool,
    facts: GpuFacts,
    narrow: bool = False,
    invariant: bool = False,
) -> LinearLaunch:
    """How 8-bit tokens times a weight are computed: with one group (``single``) parts are whole numbers, split without
    any loss; with several, as other weights are, whatever the rows with ``invariant`` as for one row.

    ``narrow``: so many groups lie in a chunk of 4-bit codes that tiles of many rows would not stay in registers.
    """
    rows = 1 if invariant and not single else rows
    row = _tuned_row("integer", rows=rows, out=out, bits=8, facts=facts)
    if narrow:
        row |= {"block_n": min(int(row["block_n"]), NARROW[0]), "block_m": min(int(row["block_m"]), NARROW[1])}
    return _planned(row, rows=rows, out=out, chunks=chunks, facts=facts, waves=WAVES if single else None)


def launch_attention(
    *, block_rows: int, bits: int, facts: GpuFacts, itemsize: int = 2, head_dim: int = 128
) -> AttentionLaunch:
    """How blocks of so many rows (token, query head) of ``itemsize`` bytes a number go over keys and values whose
    narrower side has ``bits`` bits."""
    if itemsize == 4 or head_dim > WIDE_HEAD:
        return SMALL
    row = next(row for row in rows_of("attention", facts) if block_rows <= row["rows"])
    row = row | row.get(f"bits{bits}", {})
    return AttentionLaunch(tile=int(row["tile"]), warps=int(row["warps"]), stages=_stages(row, facts))


def _planned(
    row: dict[str, Any], *, rows: int, out: int, chunks: int, facts: GpuFacts, waves: int | None = None
) -> LinearLaunch:
    """A row of the table as a launch: columns are split until so many programs are there for each processor."""
    block_n, block_m = int(row["block_n"]), int(row["block_m"])
    tiles = -(-out // block_n) * -(-rows // block_m)
    waves = waves or (FULL if rows > FEW_ROWS else WAVES)
    split = max(1, min(MOST_SPLITS, waves * facts.processors // tiles))
    split, _ = cut_columns(chunks, int(row.get("split", split)))
    return LinearLaunch(
        block_n=block_n, block_m=block_m, split=split, warps=int(row["warps"]), stages=_stages(row, facts)
    )


def _stages(row: dict[str, Any], facts: GpuFacts) -> int:
    """Loads in flight; before Ampere there are no asynchronous copies to overlap."""
    return int(row["stages"]) if facts.capability >= (8, 0) else 1


def shape_class(out: int, facts: GpuFacts) -> str:
    """``wide`` where one row alone has a tile for every processor, else ``narrow``."""
    return "wide" if out >= WIDE_TILE * facts.processors else "narrow"


def _tuned_row(kernel: str, *, rows: int, out: int, bits: int, facts: GpuFacts) -> dict[str, Any]:
    """The row for this GPU, or the fallback of its generation: the first whose ``rows`` is not exceeded, with what it
    says of this width (``bits8``) and, above that, of this shape (``narrow``, ``wide``)."""
    found = next(row for row in rows_of(kernel, facts) if rows <= row["rows"])
    special: dict[str, Any] = found.get(f"bits{bits}", {}) | found.get(shape_class(out, facts), {})
    return dict(found | special)


def rows_of(kernel: str, facts: GpuFacts) -> list[dict[str, Any]]:
    """What the table has for a GPU and a kernel: its own rows, or those of its generation."""
    table = tuned()
    names = next(names for oldest, names in GENERATIONS if facts.capability >= oldest)
    found: dict[str, Any] = {}
    for each in (*(table["fallback"][name] for name in names), table["gpus"].get(facts.name, {})):
        found |= each
    rows: list[dict[str, Any]] = found[kernel]
    return rows
