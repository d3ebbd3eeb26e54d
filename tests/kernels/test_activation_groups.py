"""8-bit activations with a scale for each group of a token: what the reference computes, from the definition."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import DYNAMIC_INT8, LayerScheme
from bitwright.core.scheme_names import parse
from bitwright.formats.records import LayerRecord
from bitwright.kernels import integer, reference

SCHEMES = [
    "w4g32-a8g32", "w8g128-a8g128", "w8-a8g64", "w4g128-asym-a8g32", "w4-a8g32", "w2g32-a8g64", "w3g64-asym-a8g32",
    "w5-asym-a8g96", "w6g32-a8g96", "w7g64-a8g32", "w8g32-asym-signed-a8g128", "w4g32-asym-fz-a8g32", "w1g32-a8g64",
    "w8-asym-signed-fz-a8g32", "w3g96-asym-fz-a8g32", "w4g32-dq-a8g64", "w4g256-a8g128", "w2-asym-a8g32",
]  # fmt: skip
ODD_SCHEMES = ["w4g7-a8g21", "w8-a8g5", "w3g20-asym-a8g10", "w4g3-asym-fz-a8g1", "w2g1-a8g4", "w4-a8g1000"]
# (out, in): whole panels and blocks; neither; one row; one column; groups that end early; several panels and chunks.
SHAPES = [(64, 128), (13, 70), (1, 300), (9, 1), (130, 416), (70, 1100)]


def layer(name: str, shape: tuple[int, int]) -> tuple[QuantizedTensor, LayerScheme]:
    """A random weight whose rows have means of their own."""
    scheme = parse(name)
    weight = torch.randn(shape) + 0.3 * torch.randn(shape[0], 1)
    return QuantizedTensor.quantize(weight, scheme.weight), scheme


def tokens(count: int, columns: int) -> Tensor:
    """Tokens of sizes of their own, with outliers, and groups of zeros and of constants."""
    x = torch.randn(count, columns) * 10.0 ** torch.randint(-3, 4, (count, 1))
    x *= 30.0 ** (torch.rand(count, columns) < 0.02).float()
    x[:, 32:64] *= (torch.rand(count, 1) < 0.8).float()
    x[:, 64:96] = torch.where(torch.rand(count, 1) < 0.3, x[:, :1], x[:, 64:96])
    return x


def codes_and_scales(x: Tensor, group: int) -> tuple[np.ndarray, np.ndarray]:
    """int8 codes ``[tokens, in]`` and the scale of each number, from the definition: max|x| / 127, half to even."""
    numbers = x.numpy().astype(np.float32)
    codes, scales = np.zeros(numbers.shape), np.zeros(numbers.shape, np.float32)
    for token in range(numbers.shape[0]):
        for first in range(0, numbers.shape[1], group):
            part = numbers[token, first : first + group]
            largest = np.abs(part).max()
            scale = np.float32(largest) if (part == part[0]).all() else np.float32(largest / np.float32(127))
            scales[token, first : first + group] = scale
            codes[token, first : first + group] = np.clip(np.rint(part / (scale or np.float32(1))), -128, 127)
    return codes, scales


@pytest.mark.parametrize("name", [*SCHEMES, *ODD_SCHEMES])
def test_the_reference_equals_the_definition_in_float64(name: str) -> None:
    for shape in SHAPES[:5]:
        tensor, scheme = layer(name, shape)
        x, bias = tokens(4, shape[1]), torch.randn(shape[0])
        assert scheme.activation_group is not None
        codes, scales = codes_and_scales(x, scheme.activation_group)
        seen, weight = torch.from_numpy(codes * scales.astype(np.float64)), tensor.dequantize(torch.float64)
        expected = seen @ weight.t() + bias.double()
        reach = tensor.dense_scale().double().abs().amax(1) * 2 ** (tensor.scheme.bits + 1)  # of zeros, taken off sums
        size = seen.abs() @ (weight.abs() + reach[:, None]).t() + bias.double().abs() + 1e-30
        found = reference.run(x, reference.pack(tensor, scheme), bias)
        worst = float(((found.double() - expected).abs() / size).max())
        assert worst <= 2e-6, f"{name} {shape}: {worst}, seed {torch.initial_seed()}"


@pytest.mark.parametrize("name", ["w4g32-a8g64", "w8-a8g32", "w4g64-asym-a8g32", "w4g32-asym-fz-a8g32"])
def test_the_reference_takes_every_step_by_itself(name: str) -> None:
    """Sum over segments, first to last, of ((products - zero part) * weight scale) * token scale, in float32."""
    tensor, scheme = layer(name, (5, 100))
    x, group = tokens(3, 100), scheme.activation_group
    assert group is not None
    step = min(group, scheme.weight.group or 100)
    codes, scales = codes_and_scales(x, group)
    scale, zero = tensor.dense_scale().float().numpy(), np.zeros((5, 4), np.float32)
    if tensor.zero is not None:
        zero = np.broadcast_to(tensor.zero.float().numpy(), scale.shape)
    nearest = np.clip(np.rint(zero), tensor.scheme.code_min, tensor.scheme.code_max)
    integers = tensor.codes.numpy().astype(np.int64)
    expected = np.zeros((3, 5), np.float32)
    for token in range(3):
        for row in range(5):
            total = np.float32(0)
            for first in range(0, 100, step):
                own, g = slice(first, first + step), 0 if scheme.weight.group is None else first // scheme.weight.group
                value = np.float32((codes[token, own] * (integers[row, own] - nearest[row, g])).sum())
                if scheme.weight.zero == "float":
                    value -= np.float32(codes[token, own].sum()) * (zero[row, g] - nearest[row, g])
                value *= scale[row, g]
                value *= scales[token, first]
                total += value
            expected[token, row] = total
    assert np.array_equal(reference.run(x, reference.pack(tensor, scheme), None).numpy(), expected)


def test_an_outlier_costs_its_own_group_alone() -> None:
    x = torch.randn(6, 128)
    quiet = integer.quantize_tokens(x, replace(DYNAMIC_INT8, group=32))
    x[:, 40] = 1000.0
    found = integer.quantize_tokens(x, replace(DYNAMIC_INT8, group=32))
    assert found.scale.shape == (6, 4) and found.group == 32
    others = torch.arange(128) // 32 != 1
    assert torch.equal(found.codes[:, others], quiet.codes[:, others])
    tensor, scheme = layer("w8g32-a8g32", (64, 128))
    exact = x.double() @ tensor.dequantize(torch.float64).t()
    errors = []
    for each in (scheme, parse("w8g32-a8")):
        y = reference.run(x, reference.pack(tensor, each), None)
        errors.append(float((y - exact).square().mean()))
    assert errors[0] < 0.5 * errors[1]


def test_a_group_of_all_columns_is_a_scale_a_token() -> None:
    for name in ("w8-a8", "w4-asym-a8", "w4-asym-fz-a8"):
        tensor, scheme = layer(name, (40, 90))
        x = tokens(9, 90)
        expected = reference.run(x, reference.pack(tensor, scheme), None)
        for group in (90, 96, 128, 70_000):
            wide = parse(f"{name}g{group}")
            assert torch.equal(reference.run(x, reference.pack(tensor, wide), None), expected)


def test_segments_share_both_scales() -> None:
    assert integer.segments(70, 32, None, 16).runs == ((0, 0, 16), (0, 16, 32), (1, 32, 48), (1, 48, 64), (2, 64, 70))
    assert integer.segments(70, 32, None, 64).runs == integer.segments(70, 32, None).runs
    assert integer.segments(70, None, None, 50).runs == ((0, 0, 50), (0, 50, 70))
    limit = integer.EXACT_INT32
    assert integer.segments(2 * limit + 9, None, None, 2 * limit).runs == (
        (0, 0, limit), (0, limit, 2 * limit), (0, 2 * limit, 2 * limit + 9),
    )  # fmt: skip


def test_reordered_columns_are_refused() -> None:
    tensor, scheme = layer("w4g32-a8g32", (8, 64))
    reordered = replace(tensor, group_index=torch.arange(64, dtype=torch.int32) % 2)
    with pytest.raises(ArgumentError, match="reordered columns"):
        reference.pack(reordered, scheme)
    with pytest.raises(ArgumentError, match=r"BW202.*reordered columns"):
        LayerRecord(scheme, (8, 64), reordered=True)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite(bad: float) -> None:
    tensor, scheme = layer("w4g32-a8g32", (20, 100))
    for column in (0, 50, 99):
        x = torch.randn(3, 100)
        x[-1, column] = bad
        with pytest.raises(BitwrightError, match="BW602"):
            reference.run(x, reference.pack(tensor, scheme), None)


def test_a_row_does_not_depend_on_its_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer, "BATCH", 8)
    for name in ("w4g32-a8g64", "w8-asym-a8g32"):
        tensor, scheme = layer(name, (37, 150))
        packed, x, bias = reference.pack(tensor, scheme), tokens(21, 150), torch.randn(37)
        together = reference.run(x, packed, bias)
        assert torch.equal(torch.cat([reference.run(row[None], packed, bias) for row in x]), together)
