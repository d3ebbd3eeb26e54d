"""Native products of 8-bit activations with a scale for each group of a token: the reference's, bit for bit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.scheme_names import parse
from bitwright.kernels import native, native_library, reference
from bitwright.kernels.native_layers import norm_linear, rms_norm
from bitwright.kernels.records import KernelSpec
from tests.kernels.test_activation_groups import SCHEMES, SHAPES, layer, tokens

pytestmark = pytest.mark.skipif(native_library.missing() is not None, reason="the native kernels are not built")

TOKENS = (1, 2, 3, 6, 7, 64, 241)


@pytest.mark.parametrize("name", SCHEMES)
def test_rows_equal_those_of_the_reference_bit_for_bit(isa: str, name: str) -> None:
    for number, shape in enumerate(SHAPES):
        tensor, scheme = layer(name, shape)
        packed, expected = native.pack(tensor, scheme), reference.pack(tensor, scheme)
        most = TOKENS[(number + len(name)) % len(TOKENS)]
        for dtype, count in ((torch.float32, most), (torch.bfloat16, TOKENS[number]), (torch.float16, 3)):
            x, bias = tokens(count, shape[1]).clamp(-6e4, 6e4).to(dtype), torch.randn(shape[0]).to(dtype)
            where = f"{name} {shape} {count} {dtype} {isa}, seed {torch.initial_seed()}"
            assert torch.equal(native.run(x, packed, bias), reference.run(x, expected, bias)), where


@pytest.mark.parametrize("name", ["w4g32-a8g32", "w8-a8g32", "w4g128-asym-a8g64", "w8g32-asym-fz-a8g96", "w3g32-a8g32"])
def test_every_number_of_tokens_gives_the_same_rows(isa: str, name: str) -> None:
    """Tiles of one to six tokens, of half a panel or a whole one; and any number of threads."""
    tensor, scheme = layer(name, (130, 352))
    packed, x, bias = native.pack(tensor, scheme), tokens(241, 352), torch.randn(130)
    together = reference.run(x, reference.pack(tensor, scheme), bias)
    before = torch.get_num_threads()
    try:
        for threads, counts in ((1, (*range(1, 20), 64, 241)), (3, (1, 4, 6, 241))):
            torch.set_num_threads(threads)
            for count in counts:
                found = native.run(x[-count:], packed, bias)
                assert torch.equal(found, together[-count:]), f"{count} tokens, seed {torch.initial_seed()}"
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["w4g32-a8g32", "w8-a8g64", "w3g64-asym-a8g32"])
def test_norms_on_the_way(isa: str, name: str) -> None:
    tensor, scheme = layer(name, (70, 300))
    packed, expected = native.pack(tensor, scheme), reference.pack(tensor, scheme)
    x, residual, weight = torch.randn(9, 300), torch.randn(9, 300), torch.randn(300)
    y, total = norm_linear(x, weight, 1e-6, packed, None, residual)
    assert torch.equal(y, reference.run(rms_norm(total, weight, 1e-6)[0], expected, None))


def test_what_the_native_kernel_refuses() -> None:
    def refusal(name: str, shape: tuple[int, int]) -> str | None:
        return native.refuse(KernelSpec(scheme=parse(name), shape=shape, device=torch.device("cpu")))

    assert refusal("w4g32-a8g32", (64, 4096)) is None and refusal("w8-a8g40", (64, 40)) is None
    assert refusal("w8-a8g48", (64, 96)) == "activations in groups of 48, not of a multiple of 32"
    assert refusal("w4g96-a8g48", (64, 96)) == "activations in groups of 48, not of a multiple of 32"
    assert refusal("w4g48-a8g96", (64, 96)) == "groups of 48, not of a multiple of 32"


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite(isa: str, bad: float) -> None:
    tensor, scheme = layer("w4g32-a8g32", (20, 100))
    packed = native.pack(tensor, scheme)
    for column, count in ((0, 1), (50, 9), (99, 3)):
        x = torch.randn(count, 100)
        x[-1, column] = bad
        with pytest.raises(BitwrightError, match="BW602"):
            native.run(x, packed, None)
        with pytest.raises(BitwrightError, match="BW602"):
            norm_linear(x, torch.ones(100), 1e-6, packed)


def test_hostile_groups_through_the_entry_points() -> None:
    from bitwright.kernels import _native

    tensor, scheme = layer("w4g64-a8g32", (20, 256))
    packed = native.pack(tensor, scheme)
    x, y = torch.randn(3, 256), torch.empty(3, 20)

    def run(bits: int, group: int) -> bool:
        return _native.linear(native.record(packed), x.data_ptr(), 0, 3, 0, bits, group, y.data_ptr(), 1)

    assert native.rounding(packed) == (8, 32) and run(8, 32) and run(8, 192) and run(8, 0)
    for bits, group in ((8, 96), (8, -32), (8, 1), (8, 33), (8, 2**31 - 1), (8, -(2**31)), (16, 32), (4, 32)):
        with pytest.raises(ValueError, match="argument"):
            run(bits, group)
        with pytest.raises(ValueError, match="argument"):
            _native.norm_linear(
                x.data_ptr(), 0, x.data_ptr(), 0, 1e-6, native.record(packed), 3, 0, bits, group, y.data_ptr(), 1
            )
    levels = native.pack(*layer("nf4g64", (20, 256)))
    with pytest.raises(ValueError, match="argument"):
        _native.linear(native.record(levels), x.data_ptr(), 0, 3, 0, 8, 64, y.data_ptr(), 1)


def test_a_group_of_all_columns_is_a_scale_a_token() -> None:
    for name in ("w8-a8", "w4-asym-a8", "w4-asym-fz-a8"):
        tensor, scheme = layer(name, (40, 90))
        x = tokens(9, 90)
        expected = native.run(x, native.pack(tensor, scheme), None)
        for group in (90, 96, 128, 70_000):
            assert torch.equal(native.run(x, native.pack(tensor, parse(f"{name}g{group}")), None), expected)


def test_reordered_columns_are_refused() -> None:
    tensor, scheme = layer("w4g32-a8g32", (8, 64))
    with pytest.raises(ArgumentError, match="reordered columns"):
        native.pack(replace(tensor, group_index=torch.arange(64, dtype=torch.int32) % 2), scheme)
