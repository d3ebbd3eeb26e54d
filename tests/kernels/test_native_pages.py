"""Native attention over pages against float64, on every instruction set; and what a row must not depend on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError
from bitwright.core.kv_codes import decode_kv, encode_kv
from bitwright.core.kv_scheme import KVCode
from bitwright.kernels import native_library
from bitwright.kernels.native_pages import Batch, Pages, attend, write_pages

pytestmark = pytest.mark.skipif(native_library.missing() is not None, reason="the native kernels are not built")

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
CODED = {"int8": (8, 8), "int4": (4, 4), "k8v4": (8, 4)}
STORAGES = [*DTYPES, *CODED]
# (query heads, heads, dimension, page): one head, groups, more rows than a tile, odd vectors, the largest.
SHAPES = [(1, 1, 2, 16), (7, 1, 64, 32), (6, 2, 80, 64), (4, 4, 24, 32), (20, 1, 128, 128), (3, 1, 512, 16)]
# New tokens and lengths of the contexts of each sequence.
BATCHES = [[(1, 1)], [(1, 300), (1, 5), (1, 128)], [(40, 40), (1, 129), (9, 400)], [(130, 257)]]


@dataclass(frozen=True)
class Case:
    """Pages with whole contexts in them, new queries, and what was stored, float64 ``[sequence][length, heads, d]``."""

    pages: Pages
    batch: Batch
    queries: Tensor
    keys: list[Tensor]
    values: list[Tensor]


def empty_pages(storage: str, count: int, heads: int, page: int, dimension: int, rotated: bool = False) -> Pages:
    """Pages full of what must not be read: not a number, in floats."""
    if storage in DTYPES:
        room = torch.full((count, heads, page, dimension), torch.nan, dtype=DTYPES[storage])
        return Pages(keys=room, values=room.clone(), dimension=dimension)
    bits = CODED[storage]
    rooms = [torch.full((count, heads, page, dimension * each // 8), 255, dtype=torch.uint8) for each in bits]
    scales = [torch.full((count, heads, page, 2), torch.nan) for _ in bits]
    return Pages(
        keys=rooms[0], values=rooms[1], dimension=dimension, key_scale=scales[0], value_scale=scales[1], bits=bits,
        rotated=(rotated, rotated),
    )  # fmt: skip


def as_batch(news: list[tuple[int, int]], tables: list[list[int]]) -> Batch:
    starts, positions = [0], []
    for new, length in news:
        positions += range(length - new, length)
        starts.append(len(positions))
    most = max(map(len, tables))
    table = torch.tensor([row + [0] * (most - len(row)) for row in tables], dtype=torch.int32)
    lengths = [length for _, length in news]
    return Batch(
        positions=torch.tensor(positions, dtype=torch.int32), starts=torch.tensor(starts, dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32), pages=table,
    )  # fmt: skip


def make(storage: str, shape: tuple[int, int, int, int], news: list[tuple[int, int]], rotated: bool = False) -> Case:
    query_heads, heads, dimension, page = shape
    counts = [-(-length // page) for _, length in news]
    order = torch.randperm(sum(counts) + 2).tolist()  # two pages belong to nobody
    tables = [[order.pop() for _ in range(count)] for count in counts]
    pages = empty_pages(storage, sum(counts) + 2, heads, page, dimension, rotated)
    keys = [torch.randn(length, heads, dimension) for _, length in news]
    values = [torch.randn(length, heads, dimension) + torch.randn(heads, 1) for _, length in news]
    whole = as_batch([(length, length) for _, length in news], tables)
    write_pages(pages, whole, torch.cat(keys), torch.cat(values))
    batch = as_batch(news, tables)
    queries = torch.randn(len(batch.positions), query_heads, dimension)
    key_code, value_code = codes_of(storage, rotated)
    stored = [[seen(x, code, storage) for x in part] for part, code in ((keys, key_code), (values, value_code))]
    return Case(pages, batch, queries, *stored)


def codes_of(storage: str, rotated: bool) -> tuple[KVCode | None, KVCode | None]:
    if storage in DTYPES:
        return None, None
    key, value = CODED[storage]
    return KVCode(bits=key, rotated=rotated), KVCode(bits=value, rotated=rotated)


def seen(x: Tensor, code: KVCode | None, storage: str) -> Tensor:
    """``x [tokens, heads, d]`` as it comes back from its storage, by the arithmetic of the caches in torch."""
    if code is None:
        return x.to(DTYPES[storage]).double()
    rows = x.transpose(0, 1)[None]
    return decode_kv(encode_kv(rows, code), code, x.shape[-1])[0].transpose(0, 1).double()


def naive(case: Case, window: int = 0) -> Tensor:
    """Softmax attention, a token and a head at a time, in float64."""
    heads, group = case.pages.keys.shape[1], case.queries.shape[1] // case.pages.keys.shape[1]
    scale, rows = case.pages.dimension**-0.5, []
    for sequence, (keys, values) in enumerate(zip(case.keys, case.values, strict=True)):
        for token in range(int(case.batch.starts[sequence]), int(case.batch.starts[sequence + 1])):
            end = int(case.batch.positions[token]) + 1
            begin = max(0, end - window) if window else 0
            for head in range(heads * group):
                scores = keys[begin:end, head // group] @ case.queries[token, head].double() * scale
                rows.append(scores.softmax(0) @ values[begin:end, head // group])
    return torch.stack(rows).view(case.queries.shape)


def check(case: Case, tolerance: float, window: int = 0) -> None:
    found = attend(case.pages, case.batch, case.queries, scale=case.pages.dimension**-0.5, window=window)
    error = (found.double() - naive(case, window)).abs().max()
    assert error <= tolerance, f"{error} on {native_library.instruction_set()}, seed {torch.initial_seed()}"


@pytest.mark.parametrize("storage", STORAGES)
def test_it_equals_float64(isa: str, storage: str) -> None:
    # Over codes, queries and weights are rounded to 15 bits and a sign: a hundredth of what rounding to codes costs.
    tolerance = 3e-4 if storage in CODED else 1e-5
    for number, shape in enumerate(SHAPES):
        check(make(storage, shape, BATCHES[number % len(BATCHES)]), tolerance)
        windowed = make(storage, shape, BATCHES[(number + 1) % len(BATCHES)])
        check(windowed, tolerance, window=(1, 50, 128, 129)[number % 4])


@pytest.mark.parametrize(("dimension", "rotated"), [
    (2, False), (6, False), (8, False), (10, False), (6, True), (48, False), (48, True), (64, False), (64, True),
    (128, True), (256, True), (512, True),
])  # fmt: skip
@pytest.mark.parametrize("storage", CODED)
def test_codes_and_scales_are_those_of_the_caches_in_torch(
    isa: str, storage: str, rotated: bool, dimension: int
) -> None:
    """Bit for bit, also where the grid is searched."""
    pages = empty_pages(storage, 2, 3, 32, dimension, rotated)
    x = torch.cat([torch.randn(37, 3, dimension), *(f(1, 3, dimension) for f in (torch.zeros, torch.ones, torch.rand))])
    x[1] *= 1e-36
    x[2] *= 1e35
    x[3] += 100
    write_pages(pages, as_batch([(40, 40)], [[1, 0]]), x, x)
    for codes, scale, code in zip(
        (pages.keys, pages.values), (pages.key_scale, pages.value_scale), codes_of(storage, rotated), strict=True
    ):
        assert scale is not None and code is not None
        wanted = encode_kv(x.transpose(0, 1)[None], code)
        assert wanted.scale is not None and wanted.low is not None
        assert torch.equal(torch.cat([codes[1], codes[0, :, :8]], 1), wanted.codes[0])
        found = torch.cat([scale[1], scale[0, :, :8]], 1)
        assert torch.equal(found, torch.cat([wanted.scale, wanted.low], -1)[0])


@pytest.mark.parametrize("shape", [(4, 2, 64, 32), (6, 2, 48, 32), (3, 1, 128, 16)])
@pytest.mark.parametrize("storage", CODED)
def test_rotated_codes(isa: str, storage: str, shape: tuple[int, int, int, int]) -> None:
    case = make(storage, shape, [(3, 200), (1, 31)], rotated=True)
    check(case, 4e-3)  # a head of one sign is one large number when it is rotated, and its range as large


@pytest.mark.parametrize("storage", STORAGES)
def test_a_row_does_not_depend_on_threads_company_chunks_or_pages(isa: str, storage: str) -> None:
    case = make(storage, (6, 2, 64, 32), [(20, 600), (1, 77)])
    expected = attend(case.pages, case.batch, case.queries, scale=0.125)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(attend(case.pages, case.batch, case.queries, scale=0.125), expected)
            for token in (0, 7, 19):
                one = as_batch([(1, 581 + token)], [case.batch.pages[0].tolist()])
                alone = attend(case.pages, one, case.queries[token : token + 1], scale=0.125)
                assert torch.equal(alone, expected[token : token + 1])
    finally:
        torch.set_num_threads(before)
    moved = torch.randperm(len(case.pages.keys))
    inverse = torch.argsort(moved)
    parts = {name: getattr(case.pages, name) for name in ("keys", "values", "key_scale", "value_scale")}
    elsewhere = replace(case.pages, **{name: part[moved] for name, part in parts.items() if part is not None})
    batch = replace(case.batch, pages=inverse[case.batch.pages.long()].to(torch.int32))
    assert torch.equal(attend(elsewhere, batch, case.queries, scale=0.125), expected)


def test_what_is_not_finite_stays_with_the_rows_that_see_it(isa: str) -> None:
    case = make("float32", (4, 2, 64, 32), [(20, 150), (3, 40)])
    clean = attend(case.pages, case.batch, case.queries, scale=0.125)
    for place in (case.pages.keys, case.pages.values):
        for bad in (torch.nan, torch.inf):
            page, kept = int(case.batch.pages[0, 4]), place.clone()
            place[page, 0, 17, 3] = bad  # position 145 of the first sequence, seen by its last five tokens
            found = attend(case.pages, case.batch, case.queries, scale=0.125)
            assert not found[15:20, :2].isfinite().all(-1).any()
            found[15:20, :2] = clean[15:20, :2]
            assert torch.equal(found, clean)
            place.copy_(kept)


def test_large_scores_do_not_overflow(isa: str) -> None:
    case = make("float32", (2, 1, 32, 32), [(1, 300)])
    case.queries.mul_(1e4)
    check(case, 1e-4)


def test_what_does_not_fit_is_refused() -> None:
    case = make("int8", (4, 2, 64, 32), [(2, 40)])
    floats = make("float32", (4, 2, 64, 32), [(2, 40)])
    for wrong in (
        {"bits": (4, 8)}, {"dimension": 63}, {"keys": case.pages.keys[:, :, :31]}, {"key_scale": None},
        {"values": case.pages.values.to(torch.int8)}, {"keys": case.pages.keys.transpose(0, 1)},
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match="BW201"):
            replace(case.pages, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="BW201"):
        attend(floats.pages, floats.batch, floats.queries.double(), scale=1.0)
    good = floats.batch
    for bad in (
        {"pages": good.pages + 99}, {"pages": good.pages - 99}, {"lengths": good.lengths + 60},
        {"lengths": -good.lengths},
        {"positions": good.positions + 1}, {"starts": good.starts + 1}, {"starts": -good.starts},
        {"pages": good.pages[:, :1].contiguous()},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="out of range"):
            attend(floats.pages, replace(good, **bad), floats.queries, scale=1.0)
    with pytest.raises(ValueError, match="out of range"):
        attend(floats.pages, good, floats.queries[:, :3].contiguous(), scale=1.0)
    with pytest.raises(ValueError, match="out of range"):
        attend(floats.pages, good, floats.queries, scale=1.0, window=-1)
