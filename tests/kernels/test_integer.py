"""8-bit activations: the worked values, exact sums, and no dependence on the batch."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitwright.core import grid
from bitwright.core.errors import BitwrightError
from bitwright.core.grid import Parameters
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import DYNAMIC_INT8
from bitwright.core.scheme_names import parse
from bitwright.kernels import integer, reference

SCHEMES = [
    "w8a8", "w4a8", "a8w8", "a8w4", "w8-asym-a8", "w8-asym-signed-a8", "w3-asym-a8", "w1-a8", "w1g32-a8", "w1-asym-a8",
    "w4g32-a8", "w4g32-asym-a8", "w3g70-asym-signed-a8", "w4g32-asym-fz-a8", "w8g32-asym-signed-fz-a8",
    "w4g32-asym-a8-dq", "w2g1-a8",
]  # fmt: skip
SHAPES = [(16, 64), (13, 300), (1, 33), (7, 1), (65, 1030)]


@pytest.fixture(params=[True, False], ids=["native", "portable"])
def product(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways to multiply int8 matrices; the native one only where it is exact."""
    native = bool(request.param)
    if native and not integer._native_product_is_exact():
        pytest.skip("torch's int8 product is missing or saturates on this processor")
    monkeypatch.setattr(integer, "_native_product_is_exact", lambda: native)
    return native


def rounded(x: Tensor) -> Tensor:
    """What the activations are after their quantization, in float64."""
    parameters = grid.fit(x, scheme=DYNAMIC_INT8)
    codes = grid.encode(x, parameters=parameters, scheme=DYNAMIC_INT8)
    return grid.decode(codes, parameters=parameters, scheme=DYNAMIC_INT8, dtype=torch.float64)


def test_worked_values() -> None:
    """E29: the row [.5, -2, 1]."""
    tokens = integer.quantize_tokens(torch.tensor([[0.5, -2.0, 1.0]]), DYNAMIC_INT8)
    assert tokens.scale.tolist() == [[torch.tensor(2.0).div(127).item()]]
    assert tokens.codes.tolist() == [[32, -127, 64]]


@pytest.mark.parametrize("name", SCHEMES)
def test_integer_product_equals_the_float_expression(product: bool, name: str) -> None:
    """E29, also where zero points lie far from the codes."""
    scheme = parse(name)
    for shape, offset in itertools.product(SHAPES, (0.0, 3.0)):
        tensor = QuantizedTensor.quantize(torch.randn(shape) + offset, scheme.weight)
        x, bias = torch.randn(5, shape[1]), torch.randn(shape[0])
        y = reference.run(x, reference.pack(tensor, scheme), bias)
        weight = tensor.dequantize(torch.float64)
        expected = rounded(x) @ weight.t() + bias.double()
        size = rounded(x).abs() @ weight.abs().t() + bias.double().abs() + 1e-30
        worst = float(((y.double() - expected).abs() / size).max())
        assert worst <= 2e-6, f"{name} {shape} native={product}: {worst}"
        if offset == 0.0 and shape[1] <= 300:
            torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_batch_of_rows_equals_the_rows_alone(product: bool, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """E29: bit for bit, wherever a row lies in the batch and in the batches that it is cut into."""
    monkeypatch.setattr(integer, "BATCH", 8)
    scheme = parse(name)
    tensor = QuantizedTensor.quantize(torch.randn(37, 150), scheme.weight)
    packed = reference.pack(tensor, scheme)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x, bias = torch.randn(21, 150).to(dtype), torch.randn(37).to(dtype)
        together = reference.run(x, packed, bias)
        alone = torch.cat([reference.run(row.unsqueeze(0), packed, bias) for row in x])
        assert torch.equal(together, alone)
        assert torch.equal(reference.run(x.flip(0), packed, bias).flip(0), together)
        assert together.dtype == dtype


@pytest.mark.parametrize("name", ["w8a8", "a8w8", "w4g32-asym-a8", "w1-a8"])
def test_a_row_of_zeros_gives_the_bias(product: bool, name: str) -> None:
    scheme = parse(name)
    packed = reference.pack(QuantizedTensor.quantize(torch.randn(10, 64), scheme.weight), scheme)
    bias = torch.randn(10)
    x = torch.randn(3, 64)
    x[1] = 0
    assert torch.equal(reference.run(x, packed, bias)[1], bias)
    assert torch.equal(reference.run(x[1:2], packed, None), torch.zeros(1, 10))


@pytest.mark.parametrize("columns", [1 << 16, (1 << 17) + 3])
def test_the_largest_sums_are_exact(product: bool, columns: int) -> None:
    """Every product as large as can be, over more columns than float32 or int32 can count."""
    scheme = parse("w8-asym-a8")
    codes = torch.full((2, columns), 255, dtype=torch.uint8)
    zero = torch.tensor([[0], [255]], dtype=torch.uint8)
    tensor = QuantizedTensor(scheme=scheme.weight, codes=codes, scale=torch.ones(2, 1, dtype=torch.float16), zero=zero)
    x = torch.full((1, columns), 127.0)  # a constant row: codes 1, scale 127
    x[0, 0] = -127.0
    y = reference.run(x / 127, reference.pack(tensor, scheme), None)
    exact = 255.0 * (columns - 2)
    assert y[0, 1] == 0
    assert abs(float(y[0, 0]) - exact) <= exact * 2**-22


def test_products_of_extremes_are_exact(product: bool) -> None:
    left = torch.randint(0, 2, (6, 3000)).mul(254).sub(127).to(torch.int8)
    right = torch.randint(0, 2, (5, 3000)).mul(255).sub(128).to(torch.int8)
    products = integer._integer_products(left, right)
    assert products.dtype == torch.int32
    assert torch.equal(products.long(), left.long() @ right.long().t())


def test_products_of_every_small_shape_and_of_slices_are_exact(product: bool) -> None:
    for tokens, columns, rows in itertools.product((1, 2, 5, 17), (1, 2, 3, 7, 8, 31, 33), (1, 2, 7, 8, 16, 33)):
        left = torch.randint(-127, 128, (tokens, 50), dtype=torch.int8)[:, 5 : 5 + columns]
        right = torch.randint(-128, 128, (rows, 50), dtype=torch.int8)[:, 9 : 9 + columns]
        exact = left.long() @ right.long().t()
        assert torch.equal(integer._integer_products(left, right).long(), exact), (tokens, columns, rows)
        whole = integer._integer_products(left.contiguous(), right.contiguous())
        assert torch.equal(whole.long(), exact), (tokens, columns, rows)


@pytest.mark.parametrize("name", ["w4g16-a8", "w4g16-asym-a8", "w4g16-asym-fz-a8"])
def test_group_index(product: bool, name: str) -> None:
    scheme = parse(name)
    tensor = QuantizedTensor.quantize(torch.randn(9, 64), scheme.weight)
    indexed = replace(tensor, group_index=torch.randint(0, 4, (64,), dtype=torch.int32))
    x = torch.randn(4, 64)
    y = reference.run(x, reference.pack(indexed, scheme), None)
    torch.testing.assert_close(y.double(), rounded(x) @ indexed.dequantize(torch.float64).t(), rtol=1e-5, atol=1e-5)


def test_segments_cover_every_column_once() -> None:
    index = torch.tensor([2, 0, 2, 0, 0], dtype=torch.int32)  # group 1 is empty
    found = integer.segments(5, 2, index)
    assert found.runs == ((0, 0, 3), (2, 3, 5))
    assert found.order is not None
    assert found.order.tolist() == [1, 3, 4, 0, 2]
    assert integer.segments(70, 32, None).runs == ((0, 0, 32), (1, 32, 64), (2, 64, 70))
    assert integer.segments(70, None, None).runs == ((0, 0, 70),)


def test_tokens_that_are_not_finite_are_refused() -> None:
    scheme = parse("w8a8")
    packed = reference.pack(QuantizedTensor.quantize(torch.randn(4, 8), scheme.weight), scheme)
    for bad in (torch.nan, torch.inf):
        with pytest.raises(BitwrightError, match="BW602"):
            reference.run(torch.tensor([[bad] + [1.0] * 7]), packed, None)


def test_a_tokens_scale_does_not_see_its_neighbours() -> None:
    x = torch.tensor([[1.0, -1.0], [1000.0, 3.0]])
    tokens = integer.quantize_tokens(x, DYNAMIC_INT8)
    assert tokens.codes[0].tolist() == [127, -127]
    assert isinstance(grid.fit(x, scheme=DYNAMIC_INT8), Parameters)
