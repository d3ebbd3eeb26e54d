"""The search of grids: against a plain restatement in whole numbers, and what it is for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bitwright.core.kv_codes import decode_kv, encode_kv, has_patterns, is_searched, rotate_head
from bitwright.core.kv_scheme import KVCode, parse_kv
from bitwright.core.kv_search import grids, most_numbers, search_grids

FOUR = KVCode(bits=4, rotated=True)
EIGHT = KVCode(bits=8)


def restated(row: Tensor, code_max: int) -> tuple[list[int], np.float32, np.float32]:
    """One row, number by number, in float32 and whole numbers."""
    x = row.numpy()
    least, width = x.min(), np.float32(x.max() - x.min())
    inverse = np.float32(np.float32(1) / width) * np.float32(4095)
    units = [int(np.rint(np.float32(np.float32(each - least) * inverse))) for each in x]
    count, sum_u = len(x), sum(units)
    best, kept = 0.0, None
    for offset, factor in grids(code_max):
        codes = [
            int(min(max(np.rint(np.float32(np.float32(unit - np.float32(offset)) * np.float32(factor))), 0), code_max))
            for unit in units
        ]
        sum_c = sum(codes)
        squares = count * sum(each * each for each in codes) - sum_c * sum_c
        products = count * sum(each * unit for each, unit in zip(codes, units, strict=True)) - sum_c * sum_u
        if squares and float(products) * float(products) / float(squares) > best:
            best, kept = float(products) * float(products) / float(squares), (codes, sum_c, squares, products)
    assert kept is not None
    codes, sum_c, squares, products = kept
    step = float(width) / 4095.0
    offset = np.float32(float(sum_u * squares - products * sum_c) / float(count * squares) * step)
    return codes, np.float32(float(products) / float(squares) * step), np.float32(least + offset)


@pytest.mark.parametrize(("width", "code_max"), [
    (2, 15), (7, 15), (16, 15), (64, 15), (80, 15), (128, 15), (256, 15), (2, 255), (5, 255), (8, 255),
])  # fmt: skip
def test_codes_are_those_of_the_restatement(width: int, code_max: int) -> None:
    rows = torch.randn(8, width, generator=torch.Generator().manual_seed(width)) * torch.logspace(-6, 6, 8)[:, None]
    rows[3, 0] += 50 * rows[3].abs().max()
    codes, scale, low, searched = search_grids(rows, code_max)
    assert bool(searched.all())
    for number, row in enumerate(rows):
        wanted = restated(row, code_max)
        assert codes[number].tolist() == wanted[0]
        assert (scale[number].item(), low[number].item()) == (float(wanted[1]), float(wanted[2]))


def test_grids_are_the_plain_one_and_its_neighbours() -> None:
    found = grids(15)
    assert len(found) == 33
    assert found[0] == (0.0, 15 / 4095)
    narrow, wide = found[1:5], found[-4:]
    assert all(1 / factor == pytest.approx(273 * 0.75) for _, factor in narrow)
    assert all(1 / factor == pytest.approx(273 * 1.1) for _, factor in wide)
    assert sum(offset for offset, _ in narrow) / 4 == pytest.approx(4095 * 0.125)
    assert narrow[1][0] - narrow[0][0] == pytest.approx(273 * 0.75 / 4)


def test_grids_of_eight_bits_are_wider_ones() -> None:
    """All numbers stay between the ends: clipped by one step of 255, a number costs more than any grid saves."""
    found, step = grids(255), 4095 / 255
    assert len(found) == 257 and len(set(found)) == 257
    assert found[0] == (0.0, 255 / 4095)
    for offset, factor in found:
        ratio = 1 / factor / step
        assert 1 - 1e-9 <= ratio < 1.5
        assert offset <= step * ratio / 2 and offset + 255.5 / factor >= 4095 - 1e-9


@pytest.mark.parametrize("width", [4, 8])
def test_eight_bits_of_few_numbers_are_several_times_nearer(width: int) -> None:
    code, rows = EIGHT, torch.randn(300, width, generator=torch.Generator().manual_seed(width))
    plain = (rows.amax(1) - rows.amin(1)).double() / 255
    assert is_searched(code, width) and not is_searched(code, 9)
    error = (decode_kv(encode_kv(rows[None, None], code), code, width)[0, 0] - rows).double().square().mean(1)
    share = float((error / (plain.square() / 12)).mean())
    assert share < {4: 0.06, 8: 0.25}[width]


@pytest.mark.parametrize("width", [8, 16, 64, 128])
def test_no_token_is_worse_and_most_are_better(width: int) -> None:
    rows = torch.cat([torch.randn(60, width, generator=torch.Generator().manual_seed(1)), torch.full((2, width), 3.0)])
    plain = KVCode(bits=4)
    wanted = decode_kv(encode_kv(rows[None, None], plain), plain, width)[0, 0]
    codes, scale, low, searched = search_grids(rows, 15)
    assert searched.tolist() == [True] * 60 + [False] * 2
    found = codes * scale[:, None] + low[:, None]
    errors = [(each - rows).double().square().sum(1)[:60] for each in (wanted, found)]
    assert bool((errors[1] <= errors[0] * (1 + 1e-3)).all())
    assert float(errors[1].mean()) < {8: 0.65, 16: 0.75, 64: 0.87, 128: 0.87}[width] * float(errors[0].mean())


def test_tiny_huge_and_empty_ranges_are_left_to_the_plain_grid() -> None:
    code, width = FOUR, 64
    for value in (0.0, 1e-32, 1e37):
        x = torch.randn(1, 1, 3, width, generator=torch.Generator().manual_seed(0)) * value
        back = decode_kv(encode_kv(x, code), code, width)
        limit = rotate_head(x).abs().amax() / 5 + 1e-40
        assert float((back - x).abs().max()) <= float(limit)
    assert not search_grids(torch.tensor([[0.0, 1e-38], [0, 1e38], [5, 5]]), 15)[3].any()


@pytest.mark.parametrize("name", ["int8-g8", "int8-g4", "int8-channel8", "int8-g8-rotated"])
def test_groups_of_8_bits_are_not_searched(name: str) -> None:
    code, x = parse_kv(name).key, torch.randn(1, 2, 8, 64, generator=torch.Generator().manual_seed(0))
    found, plain = encode_kv(x, code), encode_kv(x, code, search=False)
    assert torch.equal(found.codes, plain.codes) and not is_searched(code, 8)


@pytest.mark.parametrize("name", ["int8", "int8-g4", "int4", "int8-channel8"])
def test_a_range_that_overflows_is_its_own_affair(name: str) -> None:
    """The tokens beside it have the codes that they have alone."""
    x = torch.randn(1, 2, 16, 8, generator=torch.Generator().manual_seed(3))
    beside = x.clone()
    beside[0, 1, 8, :2] = torch.tensor([3e38, -3e38])
    beside[0, 1, 9, :2] = torch.tensor([-3e38, 3e38])  # by channel, too
    code = parse_kv(name).key
    alone, found = encode_kv(x[:, :, :8], code), encode_kv(beside, code).span(0, 8, 8 if code.grain == "channel" else 1)
    for ours, theirs in zip((found.codes, found.scale, found.low), (alone.codes, alone.scale, alone.low), strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


def test_long_rows_are_not_searched() -> None:
    assert (most_numbers(15), most_numbers(255)) == (256, 8)
    x = torch.randn(1, 1, 2, 512, generator=torch.Generator().manual_seed(0))
    coded = encode_kv(x, FOUR)
    assert coded.scale is not None
    turned = rotate_head(x)
    torch.testing.assert_close(coded.scale[..., 0], (turned.amax(-1) - turned.amin(-1)) / 15)


@pytest.mark.parametrize("width", [2, 8, 16, 32])
def test_the_offset_of_small_heads_holds_their_largest_number(width: int) -> None:
    """A number that is far larger than the others costs next to nothing, wherever it stands."""
    assert has_patterns(FOUR, width)
    assert not has_patterns(FOUR, 64) and not has_patterns(parse_kv("int4").key, width)
    assert has_patterns(parse_kv("int8-rotated").key, 8) and not has_patterns(parse_kv("int8-rotated").key, 16)
    assert not has_patterns(EIGHT, width)
    x = torch.randn(1, 1, width, width, generator=torch.Generator().manual_seed(width))
    usual = (decode_kv(encode_kv(x, FOUR), FOUR, width) - x).square().mean()
    for height in (40, -40):
        large = x + height * torch.eye(width)
        coded = encode_kv(large, FOUR)
        assert coded.scale is not None
        assert (coded.scale.view(torch.int32) & 31)[0, 0, :, 0].tolist() == list(range(width))
        error = (decode_kv(coded, FOUR, width) - large).square().mean()
        assert float(error) <= 2.5 * float(usual) + 1e-9


def test_patterns_are_of_single_tokens_and_read_the_same_rotated() -> None:
    x = torch.randn(2, 3, 20, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    whole = encode_kv(x, FOUR)
    alone = encode_kv(x[1:, 1:2, 7:8], FOUR)
    assert whole.scale is not None and alone.scale is not None
    assert torch.equal(whole.codes[1:, 1:2, 7:8], alone.codes)
    assert torch.equal(whole.scale[1:, 1:2, 7:8], alone.scale)
    turned = decode_kv(whole, FOUR, 16, keep_rotated=True)
    torch.testing.assert_close(rotate_head(turned), decode_kv(whole, FOUR, 16))
