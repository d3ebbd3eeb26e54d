"""Attention on pages against float64 on the numbers stored; written codes against those of ``core.kv_codes``."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError
from bitwright.core.kv_codes import StaticParameters, decode_kv, encode_kv
from bitwright.core.kv_scheme import FLOAT, KVCode
from bitwright.core.kv_search import search_grids
from bitwright.kernels.gpu import attention, launch, library
from tests.kernels.gpu.oracle import relative_error

PAGE = 32
CODES = {
    "float": FLOAT, "int8": KVCode(bits=8), "int4": KVCode(bits=4), "fp8": KVCode(bits=8, kind="fp8", symmetric=True),
    "int8-sym": KVCode(bits=8, symmetric=True), "int4-sym": KVCode(bits=4, symmetric=True),
    "int8-static": KVCode(bits=8, grain="static_layer"), "fp8-static": KVCode(bits=8, kind="fp8", grain="static_head",
                                                                              symmetric=True),
}  # fmt: skip


class Pages:
    """One side of a cache with room for ``pages`` pages, and what the numbers in it are worth."""

    def __init__(self, code: KVCode, pages: int, heads: int, head_dim: int, dtype: torch.dtype) -> None:
        self.code, self.head_dim = code, head_dim
        width = head_dim if code.is_float else head_dim * code.bits // 8
        self.data = torch.zeros(pages, heads, PAGE, width, dtype=dtype if code.is_float else torch.uint8)
        self.scales = torch.full((pages, heads, PAGE, 2 - code.symmetric), torch.nan)
        if code.is_static:
            offset = torch.zeros(heads) if code.symmetric else torch.randn(heads) / 9
            self.scales = torch.stack([torch.rand(heads) / (90 if code.kind == "fp8" else 30) + 0.01, offset], dim=1)

    @property
    def side(self) -> attention.StoredSide:
        return attention.stored_side(self.code, self.data, self.scales)

    @property
    def parameters(self) -> StaticParameters | None:
        return StaticParameters(self.scales[:, 0].clone(), self.scales[:, 1].clone()) if self.code.is_static else None

    def fill(self, pages: Tensor, offsets: Tensor, numbers: Tensor) -> None:
        """Store ``numbers [tokens, heads, head_dim]`` as the reference would."""
        coded = encode_kv(numbers.transpose(0, 1)[None], self.code, self.parameters)
        self.data[pages.long(), :, offsets.long()] = coded.codes[0].transpose(0, 1).to(self.data.dtype)
        if coded.scale is not None:
            scale = coded.scale if coded.low is None else torch.cat([coded.scale, coded.low], dim=-1)
            self.scales[pages.long(), :, offsets.long()] = scale[0].transpose(0, 1)

    def parts(self, pages: Tensor, offsets: Tensor) -> Any:
        """Codes and parameters of some tokens as the reference has them: ``[1, heads, tokens, ...]``."""
        codes = self.data[pages.long(), :, offsets.long()].transpose(0, 1)[None]
        if self.code.is_static or self.code.is_float:
            return codes, None, None
        scales = self.scales[pages.long(), :, offsets.long()].transpose(0, 1)[None]
        return codes, scales[..., :1], None if self.code.symmetric else scales[..., 1:]

    def numbers(self, pages: Tensor, offsets: Tensor) -> Tensor:
        """What is stored, float64 ``[heads, tokens, head_dim]``."""
        coded = encode_kv(torch.zeros(1, self.data.shape[1], 1, self.head_dim), self.code, self.parameters)
        codes, scale, low = self.parts(pages, offsets)
        coded = type(coded)(codes, scale, low)
        return decode_kv(coded, self.code, self.head_dim, self.parameters)[0].double()


def places(lengths: list[int]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A page table with the pages in random order, and where each sequence's tokens lie."""
    most = -(-max(lengths) // PAGE)
    order = torch.randperm(len(lengths) * most).view(len(lengths), most).to(torch.int32)
    pages = [order[i].repeat_interleave(PAGE)[:length].contiguous() for i, length in enumerate(lengths)]
    offsets = [(torch.arange(length) % PAGE).to(torch.int32) for length in lengths]
    return order, pages, offsets


def exact_attention(q: Tensor, keys: Tensor, values: Tensor, window: int) -> Tensor:
    """``q [new, heads, head_dim]`` on ``keys``, ``values`` ``[kv_heads, length, head_dim]``, float64."""
    new, heads, head_dim = q.shape
    group, length = heads // keys.shape[0], keys.shape[1]
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    scores = torch.einsum("nhd,hld->hnl", q.double(), keys) * head_dim**-0.5
    at, position = torch.arange(length), torch.arange(length - new, length)[:, None]
    hidden = (at > position) | (at <= position - window) if window else at > position
    return torch.einsum("hnl,hld->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), values)


def check(key: str, value: str, dtype: torch.dtype, *, lengths: list[int], new: list[int], heads: int = 4,
          kv_heads: int = 2, head_dim: int = 32, window: int = 0, split: int | None = None) -> None:  # fmt: skip
    table, pages, offsets = places(lengths)
    sides = [Pages(CODES[name], table.numel(), kv_heads, head_dim, dtype) for name in (key, value)]
    fresh = [torch.randn(sum(lengths), kv_heads, head_dim).to(dtype) for _ in sides]
    for side, numbers in zip(sides, fresh, strict=True):
        side.fill(torch.cat(pages), torch.cat(offsets), numbers)
    starts = [0, *torch.tensor(new).cumsum(0).tolist()]
    blocks, rows = attention.arrange(starts, heads // kv_heads)
    batch = attention.AttentionBatch(
        *(torch.tensor(each, dtype=torch.int32) for each in (blocks, starts, lengths)), table, rows, max(lengths)
    )
    q = torch.randn(sum(new), heads, head_dim).to(dtype)
    found = attention.attend(q, sides[0].side, sides[1].side, batch, window=window, split=split)
    for number, (start, stop) in enumerate(pairwise(starts)):
        keys, values = (each.numbers(pages[number], offsets[number]) for each in sides)
        exact = exact_attention(q[start:stop], keys, values, window)
        tolerance = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2, torch.float32: 2e-6}[dtype]
        assert relative_error(found[start:stop], exact) < tolerance, (key, value, number)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", ["float", "int8", "int4", "fp8"])
def test_decoding_is_attention_on_what_is_stored(name: str) -> None:
    check(name, name, torch.float32, lengths=[70, 9], new=[1, 1], split=64)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("new", [[1, 1], [3, 1]])
def test_more_parts_of_a_context_than_are_put_together_at_a_time(new: list[int], monkeypatch: Any) -> None:
    monkeypatch.setattr(attention, "TOGETHER", 2)
    check("float", "float", torch.float32, lengths=[300, 70], new=new, split=64)
    check("int8", "int8", torch.float32, lengths=[330], new=[1], split=64, window=70)


@pytest.mark.usefixtures("interpreted")
def test_parts_that_do_not_fit_together_are_made_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """A long prompt in blocks of few queries, whose contexts are cut alike: 5 blocks, 2 at a time."""
    sizes, found, empty = [], [], torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **named: sizes.append(size) or empty(*size, **named))
    table, pages, offsets = places([70])
    side = Pages(CODES["int8"], table.numel(), 1, 32, torch.float32)
    side.fill(pages[0], offsets[0], torch.randn(70, 1, 32))
    blocks, rows = attention.arrange([0, 70], 1, few=True)
    numbers = (torch.tensor(each, dtype=torch.int32) for each in (blocks, [0, 70], [70]))
    batch, q = attention.AttentionBatch(*numbers, table, rows, 70), torch.randn(70, 1, 32)
    for most in (1 << 28, 2 * 4 * 2 * 16 * 34):
        monkeypatch.setattr(attention, "MOST_PARTS", most)
        found.append(attention.attend(q, side.side, side.side, batch, split=64))
    assert torch.equal(found[0], found[1])
    assert [size[0] for size in sizes if len(size) == 5] == [5, 5, 2, 2] and len(blocks) == 5
    numbers_stored = side.numbers(pages[0], offsets[0])
    assert relative_error(found[1], exact_attention(q, numbers_stored, numbers_stored, 0)) < 2e-6


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", ["int8", "int4", "fp8", "int8-sym", "int4-sym"])
@pytest.mark.parametrize("size", [0.1, 60000.0])
def test_weights_of_codes_are_neither_too_small_nor_too_large_for_float16(name: str, size: float) -> None:
    """One token, whose value is nothing, has nearly all weight, as the first often has."""
    code, length = CODES[name], 150
    table, pages, offsets = places([length])
    keys, values = Pages(FLOAT, table.numel(), 1, 32, torch.float16), Pages(code, table.numel(), 1, 32, torch.float16)
    q, k = torch.ones(1, 1, 32), torch.zeros(length, 1, 32)
    k[0] = 7.0 / 32**0.5
    v = torch.rand(length, 1, 32) * size * torch.tensor([1.0, -1.0])[torch.randint(0, 2, (32,))]
    v[0] = 0.0
    keys.fill(pages[0], offsets[0], k.half())
    values.fill(pages[0], offsets[0], v)
    numbers = (torch.tensor(each, dtype=torch.int32) for each in ([(0, 0)], [0, 1], [length]))
    batch = attention.AttentionBatch(*numbers, table, 16, length)
    found = attention.attend(q.half(), keys.side, values.side, batch)
    exact = exact_attention(q, keys.numbers(pages[0], offsets[0]), values.numbers(pages[0], offsets[0]), 0)
    assert relative_error(found, exact) < 1e-3


@pytest.mark.usefixtures("interpreted")
def test_prompts_in_parts_with_a_window_and_different_codes() -> None:
    check("int8", "int4", torch.float16, lengths=[45, 80], new=[45, 20], window=33)


@pytest.mark.slow
@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("head_dim", [32, 48])
def test_attention_on_every_code(name: str, dtype: torch.dtype, head_dim: int) -> None:
    check(name, "int4", dtype, lengths=[200, 1, 64], new=[1, 1, 1], head_dim=head_dim, heads=6, split=64)
    check("int8", name, dtype, lengths=[100, 31], new=[40, 3], head_dim=head_dim, heads=2, kv_heads=1)


def written(name: str, numbers: Tensor) -> tuple[Any, Any]:
    """What the program and what the reference stores of ``numbers [tokens, heads, head_dim]``."""
    tokens, heads, head_dim = numbers.shape
    table, pages, offsets = places([tokens])
    side = Pages(CODES[name], table.numel(), heads, head_dim, torch.float32)
    attention.append(numbers, numbers, pages[0], offsets[0], side.side, side.side)
    coded = encode_kv(numbers.transpose(0, 1)[None], CODES[name], side.parameters)
    return side.parts(pages[0], offsets[0]), (coded.codes, coded.scale, coded.low)


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("name", CODES)
def test_written_codes_are_bit_for_bit_those_of_the_reference(name: str) -> None:
    numbers = torch.randn(4, 1, 32)
    numbers[1], numbers[2] = 0.0, -2.5
    numbers[3, 0] = torch.linspace(-1e-3, 1e-3, 32)
    found, expected = written(name, numbers)
    for ours, theirs in zip(found, expected, strict=True):
        present = theirs is not None and not CODES[name].is_static
        assert not present or ours is None or torch.equal(ours.view(theirs.dtype), theirs)
    assert torch.equal(found[0], expected[0])


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.float32), (48, torch.float16), (128, torch.bfloat16)])
def test_searched_codes_are_bit_for_bit_those_of_the_reference(head_dim: int, dtype: torch.dtype) -> None:
    code = replace(CODES["int4"], rotated=True)
    numbers = torch.randn(7, 2, head_dim)
    numbers[1], numbers[2] = numbers[1] ** 3, torch.randint(-2, 3, (2, head_dim)).float()
    numbers[3], numbers[4], numbers[5] = 0.0, -2.5, 1e-32 * numbers[5]
    numbers = numbers.to(dtype)
    table, pages, offsets = places([7])
    sides = [Pages(each, table.numel(), 2, head_dim, torch.float32) for each in (code, CODES["int4"])]
    attention.append(numbers, numbers, pages[0], offsets[0], sides[0].side, sides[1].side)
    codes, scale, low = (part[0].transpose(0, 1).flatten(0, 1) for part in sides[0].parts(pages[0], offsets[0]))
    rows = numbers.float().flatten(0, 1)
    best, best_scale, best_low, searched = search_grids(rows, 15)
    plain = encode_kv(numbers.float().transpose(0, 1)[None], CODES["int4"])
    kept = [part[0].transpose(0, 1).flatten(0, 1) for part in (plain.codes, plain.scale, plain.low)]
    pairs = best[:, 0::2] | best[:, 1::2] << 4
    assert searched.tolist() == [True] * 6 + [False] * 6 + [True] * 2
    for found, chosen, first in zip((codes, scale, low), (pairs, best_scale[:, None], best_low[:, None]), kept,
                                    strict=True):  # fmt: skip
        assert torch.equal(found, torch.where(searched[:, None], chosen, first))
    assert not torch.equal(codes, kept[0])
    found = sides[1].parts(pages[0], offsets[0])
    assert torch.equal(found[0], plain.codes), "values beside them, which are not rotated, keep the plain range"


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("head_dim", [8, 6])
def test_searched_codes_of_8_bits_are_those_of_the_reference(head_dim: int) -> None:
    """Keys are searched and values, rotated and of 4 bits, too, each in grids of their own."""
    codes = (KVCode(bits=8), KVCode(bits=4, rotated=True))
    numbers = torch.randn(3, 2, head_dim)
    numbers[1, 0] = -2.5
    table, pages, offsets = places([3])
    sides = [Pages(each, table.numel(), 2, head_dim, torch.float32) for each in codes]
    attention.append(numbers, numbers, pages[0], offsets[0], sides[0].side, sides[1].side)
    found = sides[0].parts(pages[0], offsets[0])
    wanted = encode_kv(numbers.transpose(0, 1)[None], codes[0])
    for ours, theirs in zip(found, (wanted.codes, wanted.scale, wanted.low), strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)
    pairs = search_grids(numbers.flatten(0, 1), 15)[0]
    own = sides[1].parts(pages[0], offsets[0])[0]
    stored = own[0].transpose(0, 1).flatten(0, 1)
    assert torch.equal(stored[[0, 1, 3, 4, 5]], (pairs[:, 0::2] | pairs[:, 1::2] << 4)[[0, 1, 3, 4, 5]])


@pytest.mark.usefixtures("interpreted")
def test_keys_and_queries_are_turned_by_their_positions() -> None:
    x, angle = torch.randn(3, 2, 32), torch.randn(3, 16)
    first, second = x.double().chunk(2, dim=-1)
    cosine, sine = angle.cos(), angle.sin()
    exact = torch.cat((first * cosine[:, None] - second * sine[:, None],
                       second * cosine[:, None] + first * sine[:, None]), dim=-1)  # fmt: skip
    assert relative_error(attention.turn(x, (cosine, sine)), exact) < 1e-6
    table, pages, offsets = places([3])
    sides = [Pages(CODES["float"], table.numel(), 2, 32, torch.float32) for _ in range(2)]
    attention.append(x, x, pages[0], offsets[0], sides[0].side, sides[1].side, (cosine, sine))
    assert relative_error(sides[0].numbers(pages[0], offsets[0]).transpose(0, 1), exact) < 1e-6
    assert torch.equal(sides[1].numbers(pages[0], offsets[0]).transpose(0, 1), x.double())


def test_codes_that_cannot_be_read_are_refused() -> None:
    for code in (KVCode(bits=2, grain="channel", group=32), KVCode(bits=8, group=32), KVCode(bits=2)):
        with pytest.raises(ArgumentError, match="no GPU attention"):
            attention.stored_side(code, torch.empty(0))
    with pytest.raises(ArgumentError, match="heads of 7 numbers: they are searched in pairs"):
        attention.stored_side(KVCode(bits=8), torch.empty(1, 1, 32, 7), torch.empty(1, 1, 32, 2))


def test_blocks_cover_every_row_once() -> None:
    blocks, rows = attention.arrange([0, 1, 2, 3], 4)
    assert (blocks, rows) == ([(0, 0), (1, 0), (2, 0)], 16)
    blocks, rows = attention.arrange([0, 40, 41], 4)
    assert rows == 64 and blocks == [(0, 0), (0, 64), (0, 128), (1, 0)]
    assert attention.arrange([0, 1], 71) == ([(0, 0)], 128)


def test_contexts_are_split_where_there_are_few_programs_and_alike_where_that_is_asked_for() -> None:
    def split(sequences: int, longest: int, rows: int = 16, *, invariant: bool = False) -> int:
        blocks = torch.zeros(sequences, 2, dtype=torch.int32)
        batch = attention.AttentionBatch(blocks, blocks, blocks, blocks, rows, longest)
        return attention.choose_split(batch, 8, 132, invariant=invariant)

    assert split(1, 65536) <= 65536 // 60 and split(1, 65536) % attention.TILE == 0
    assert split(64, 8192) >= 4096 and split(200, 8192) == 8192
    assert split(1, 100) >= 100 and split(1, 5000, rows=64) >= 5000
    assert split(1, 100, invariant=True) == split(64, 65536, invariant=True)


@pytest.mark.usefixtures("interpreted")
def test_smaller_tiles_of_keys_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    row = {"rows": 1 << 30, "tile": 32, "warps": 4, "stages": 1}
    monkeypatch.setitem(launch.tuned()["gpus"], library.UNKNOWN.name, {"attention": [row]})
    tiles, real = [], library.program

    class Attend:
        def __getitem__(self, grid: Any) -> Any:
            return lambda *given, **named: (
                tiles.append(named["BLOCK_T"]),
                real("attention").attend[grid](*given, **named),
            )

    watched = SimpleNamespace(attend=Attend(), combine=real("attention").combine)
    monkeypatch.setattr(library, "program", lambda name: watched if name == "attention" else real(name))
    check("int8", "float", torch.float16, lengths=[170, 9], new=[1, 1], split=64)
    assert set(tiles) == {32}
