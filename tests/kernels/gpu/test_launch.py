"""Launches: plain functions of sizes, checked for every size that matters; the table of tuned ones, for its form."""

from __future__ import annotations

from dataclasses import replace

import pytest

from bitwright.kernels.gpu.launch import (
    MOST_SPLITS,
    SMALL,
    cut_columns,
    expands,
    launch_attention,
    launch_fp8,
    launch_integer,
    launch_linear,
    shape_class,
    shared_bytes,
    tuned,
)
from bitwright.kernels.gpu.library import GpuFacts
from tests.kernels.gpu.compilation_facts import A10, ADA, AMPERE, GENERATIONS, HOPPER, VOLTA


@pytest.mark.parametrize("chunks", [1, 2, 7, 16, 86])
@pytest.mark.parametrize("split", [1, 2, 3, 8, 200])
def test_every_chunk_has_one_program_and_no_program_is_idle(chunks: int, split: int) -> None:
    parts, each = cut_columns(chunks, split)
    assert 1 <= parts <= max(1, split)
    assert (parts - 1) * each < chunks <= parts * each


def test_columns_are_split_until_the_gpu_is_full() -> None:
    one = launch_linear(rows=1, out=4096, chunks=16, bits=4, itemsize=2, facts=HOPPER)
    assert one.block_m == 16 and 64 * one.split >= 2 * HOPPER.processors
    for rows in (17, 64, 200):  # one program for each tile would leave processors without work
        some = launch_linear(rows=rows, out=4096, chunks=16, bits=4, itemsize=2, facts=HOPPER)
        tiles = -(-4096 // some.block_n) * -(-rows // some.block_m)
        assert HOPPER.processors < tiles * some.split <= 2 * HOPPER.processors
    many = launch_linear(rows=600, out=4096, chunks=16, bits=4, itemsize=2, facts=HOPPER)
    assert many.split == 1 and many.block_m >= 64
    wide = launch_linear(rows=1, out=128256, chunks=16, bits=4, itemsize=2, facts=HOPPER)
    assert wide.split == 1


def test_the_order_of_sums_does_not_depend_on_the_rows_where_that_is_asked_for() -> None:
    launches = {
        launch_linear(rows=rows, out=4096, chunks=16, bits=4, itemsize=2, facts=HOPPER, invariant=True)
        for rows in (1, 5, 16, 17, 300, 5000)
    }
    assert len(launches) == 1
    launches = {
        launch_integer(rows=rows, out=4096, chunks=32, single=False, facts=HOPPER, invariant=True)
        for rows in (1, 16, 17, 300)
    }
    assert len(launches) == 1
    launches = {launch_fp8(rows=rows, out=4096, chunks=32, facts=HOPPER, invariant=True) for rows in (1, 16, 17, 300)}
    assert len(launches) == 1


@pytest.mark.parametrize("facts", GENERATIONS.values(), ids=[str(number) for number in GENERATIONS])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 65, 1 << 20])
def test_launches_are_what_a_gpu_can_do(facts: object, rows: int) -> None:
    assert facts in GENERATIONS.values()
    for itemsize in (2, 4):
        found = launch_linear(rows=rows, out=4096, chunks=16, bits=4, itemsize=itemsize, facts=facts)  # type: ignore[arg-type]
        assert {found.block_n, found.block_m, found.warps} <= {1 << power for power in range(9)}
        assert 1 <= found.split <= MOST_SPLITS and found.block_n >= 16 and found.block_m >= 16
        assert found.stages == 1 or facts.capability >= (8, 0)  # type: ignore[attr-defined]


@pytest.mark.parametrize("facts", [*GENERATIONS.values(), A10], ids=lambda facts: facts.name)
@pytest.mark.parametrize("bits", range(1, 9))
def test_loads_in_flight_fit_the_memory_that_programs_share(facts: GpuFacts, bits: int) -> None:
    for rows in (1, 17, 33, 64, 65, 1000):
        for itemsize in (2, 4):
            found = launch_linear(rows=rows, out=4096, chunks=16, bits=bits, itemsize=itemsize, facts=facts)
            sizes = {"bits": bits, "itemsize": itemsize, "facts": facts}
            assert shared_bytes(found, **sizes) <= facts.shared_bytes and found.block_m >= 16  # type: ignore[arg-type]
            assert found.stages >= 2 or facts.capability < (8, 0), "loads overlap where they can"
            if facts is HOPPER and bits == 4 and rows < 65 and itemsize == 2:
                assert found.stages == 3  # what was tuned is not made smaller without need


def test_weights_are_unpacked_first_for_many_rows_and_soon_where_there_are_no_matrix_units() -> None:
    assert [expands(rows, HOPPER) for rows in (1, 64, 1023, 1024)] == [False, False, False, True]
    assert [expands(rows, VOLTA) for rows in (1, 16, 17)] == [False, False, True]


def test_columns_of_8_bit_and_fp8_tokens_are_split_while_processors_would_be_idle() -> None:
    for rows in (1, 16, 17, 100, 200):
        for found in (
            launch_integer(rows=rows, out=1024, chunks=32, single=False, facts=HOPPER),
            launch_fp8(rows=rows, out=1024, chunks=32, facts=HOPPER),
        ):
            tiles = -(-1024 // found.block_n) * -(-rows // found.block_m)
            most = 4 if rows <= 16 else 2
            assert found.split == 16 or HOPPER.processors < tiles * found.split <= most * HOPPER.processors
            assert found.split > 1
        assert launch_integer(rows=rows, out=1024, chunks=32, single=True, facts=HOPPER).split > 1
    assert launch_integer(rows=5000, out=1024, chunks=32, single=False, facts=HOPPER).split == 1
    assert launch_fp8(rows=5000, out=1024, chunks=32, facts=HOPPER).split == 1


def test_every_generation_has_a_fallback_of_its_own_where_it_needs_one() -> None:
    def warps(facts: object) -> int:
        return launch_linear(rows=64, out=4096, chunks=16, bits=4, itemsize=2, facts=facts).warps  # type: ignore[arg-type]

    assert [warps(facts) for facts in (AMPERE, ADA, HOPPER)] == [4, 8, 4]
    newer = replace(HOPPER, name="a later one", capability=(12, 0))
    assert warps(newer) == warps(HOPPER)


def test_tiles_with_many_groups_in_a_chunk_have_few_rows() -> None:
    for facts in (AMPERE, HOPPER):
        sizes = {"rows": 300, "out": 1024, "chunks": 32, "single": False, "facts": facts}
        assert launch_integer(**sizes, narrow=True).block_m == 32 < launch_integer(**sizes).block_m  # type: ignore[arg-type]


def test_the_tuned_table_is_whole() -> None:
    table = tuned()
    for entry in (*table["fallback"].values(), *table["gpus"].values()):
        for kernel, rows in entry.items():
            fields = {"tile", "warps", "stages"} if kernel == "attention" else {"block_n", "block_m", "warps", "stages"}
            bounds = [row["rows"] for row in rows]
            assert bounds == sorted(bounds) and (not bounds or bounds[-1] >= 1 << 29)
            assert all(fields <= set(row) for row in rows)
            assert kernel != "attention" or all(row["tile"] in (32, 64) for row in rows)


def test_a_known_gpu_has_its_own_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"rows": 1 << 30, "block_n": 32, "block_m": 16, "split": 3, "warps": 2, "stages": 4, "bits8": {"block_n": 64}}
    monkeypatch.setitem(tuned()["gpus"], VOLTA.name, {"linear": [row]})
    four = launch_linear(rows=1, out=64, chunks=16, bits=4, itemsize=2, facts=VOLTA)
    assert (four.block_n, four.split, four.warps, four.stages) == (32, 3, 2, 1)
    assert launch_linear(rows=1, out=64, chunks=16, bits=8, itemsize=2, facts=VOLTA).block_n == 64


@pytest.mark.parametrize("kernel", ["linear", "integer", "fp8"])
def test_rows_of_every_kernel_are_found_by_gpu_and_by_shape(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"rows": 1 << 30, "block_n": 32, "block_m": 16, "split": 5, "warps": 2, "stages": 2, "wide": {"split": 1}}
    monkeypatch.setitem(tuned()["gpus"], HOPPER.name, {kernel: [row]})

    def split(out: int) -> tuple[int, int]:
        sizes = {"rows": 1, "out": out, "chunks": 30, "facts": HOPPER}
        found = {
            "linear": lambda: launch_linear(bits=4, itemsize=2, **sizes),  # type: ignore[arg-type]
            "integer": lambda: launch_integer(single=False, **sizes),  # type: ignore[arg-type]
            "fp8": lambda: launch_fp8(**sizes),  # type: ignore[arg-type]
        }[kernel]()
        return found.split, found.warps

    assert split(4096) == (5, 2) and split(64 * HOPPER.processors) == (1, 2)
    assert [shape_class(out, HOPPER) for out in (4096, 8448)] == ["narrow", "wide"]


def test_rows_of_attention_are_found_by_gpu_by_the_size_of_blocks_and_by_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def found(facts: GpuFacts, rows: int, bits: int) -> tuple[int, int, int]:
        one = launch_attention(block_rows=rows, bits=bits, facts=facts)
        assert launch_attention(block_rows=rows, bits=bits, facts=facts, itemsize=4) == SMALL
        assert launch_attention(block_rows=rows, bits=bits, facts=facts, head_dim=256) == SMALL
        return one.tile, one.warps, one.stages

    # Tiles of many rows on 4-bit codes do not stay in registers with loads ahead before Hopper.
    assert [found(facts, 64, 4)[2] for facts in GENERATIONS.values()] == [1, 1, 1, 1, 2]
    assert [found(facts, 16, 4)[2] for facts in GENERATIONS.values()] == [1, 1, 2, 2, 2]
    assert found(AMPERE, 64, 8) == (64, 8, 2) and found(AMPERE, 16, 8) == (64, 4, 2)
    row = {"rows": 1 << 30, "tile": 32, "warps": 2, "stages": 3, "bits4": {"warps": 1}}
    monkeypatch.setitem(tuned()["gpus"], AMPERE.name, {"attention": [row]})
    assert found(AMPERE, 16, 8) == (32, 2, 3) and found(AMPERE, 16, 4) == (32, 1, 3)
