"""The canonical tensor: shapes, both axes, tails, double quantization that stores integers, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.core.grid import Parameters
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme
from bitwright.core.scheme_names import parse
from tests.core.restatement import TINY, array, decoded, grouped, nearest_error
from tests.core.strategies import matrices, random_matrix, schemes


def quantize(values: Tensor, name: str) -> QuantizedTensor:
    return QuantizedTensor.quantize(values, parse(name).weight)


@given(matrices(), schemes())
def test_shapes_and_dtypes(values: Tensor, scheme: QuantScheme) -> None:
    tensor = QuantizedTensor.quantize(values, scheme)
    out, columns = values.shape
    length = values.shape[scheme.axis]
    groups = 1 if scheme.group is None else -(-length // scheme.group)
    expected = (out, groups) if scheme.axis == 1 else (groups, columns)
    assert tensor.shape == (out, columns) and tensor.group_count == groups
    assert tensor.dense_scale().shape == expected and tensor.codes.is_contiguous()
    assert tensor.codes.dtype == (torch.int8 if scheme.code == "int" else torch.uint8)
    assert int(tensor.codes.min()) >= scheme.code_min and int(tensor.codes.max()) <= scheme.code_max
    assert (tensor.zero is None) == scheme.symmetric
    assert tensor.dequantize().shape == values.shape and tensor.dequantize().is_contiguous()


@pytest.mark.parametrize("name", ["w4g32", "w4g32-asym", "w3g32-asym-fz", "nf4g32", "w4g32-dq"])
def test_w8_seventy_columns_in_groups_of_32(name: str) -> None:
    values = random_matrix(["normal", "positive", "outlier"], 70, 8)
    tensor = quantize(values, name)
    assert tensor.dense_scale().shape == (3, 3) and tensor.codes.shape == (3, 70)
    np.testing.assert_allclose(array(tensor.dequantize()), decoded(tensor), rtol=1e-6, atol=1e-6)
    if name != "w4g32-dq":  # its scales are rounded together
        tail = quantize(values[:, 64:], name)
        assert torch.equal(tensor.codes[:, 64:], tail.codes) and torch.equal(
            tensor.dense_scale()[:, 2:], tail.dense_scale()
        )
        assert torch.equal(tensor.dequantize()[:, 64:], tail.dequantize())


@given(matrices(), schemes(double_quant=False))
def test_groups_along_axis_0_are_those_of_the_transpose(values: Tensor, scheme: QuantScheme) -> None:
    across = QuantizedTensor.quantize(values, replace(scheme, axis=0))
    along = QuantizedTensor.quantize(values.t(), replace(scheme, axis=1))
    assert torch.equal(across.codes, along.codes.t()) and torch.equal(across.dense_scale(), along.dense_scale().t())
    assert torch.equal(across.dequantize(), along.dequantize().t())


def with_double_quant(scheme: QuantScheme, nested: str) -> QuantScheme:
    inner = parse(f"w4-dq({nested})").weight.scale_scheme
    return replace(scheme, scale_scheme=inner)


@given(
    matrices(kinds=("normal", "outlier", "positive", "constant", "integers"), columns=200),
    schemes(double_quant=False),
    st.sampled_from(["bnb", "ggml", "w8g4-asym", "w6g7-sf32", "w8-asym-sf32"]),
)
def test_w7_double_quantization(values: Tensor, scheme: QuantScheme, nested: str) -> None:
    """Scales are stored as integers, off by half a step of their own grid at most; codes are nearest on those."""
    if scheme.zero == "float":
        scheme = replace(scheme, zero="integer")
    plain, tensor = (QuantizedTensor.quantize(values, s) for s in (scheme, with_double_quant(scheme, nested)))
    assert isinstance(tensor.scale, QuantizedTensor) and not tensor.scale.codes.is_floating_point()
    wanted = plain.dense_scale() if scheme.axis == 1 else plain.dense_scale().t()
    found = tensor.dense_scale() if scheme.axis == 1 else tensor.dense_scale().t()
    _, step, _ = grouped(tensor.scale)
    error = np.abs(array(found) - array(wanted)).reshape(1, -1)
    assert (error <= step / 2 * 1.001 + np.abs(array(wanted)).max() * 2.0**-10 + TINY).all()
    codes, scale, zero = grouped(tensor)
    arithmetic = np.abs(scale) * (np.abs(zero) + np.abs(codes) + 2) * 2.0**-21
    arithmetic = arithmetic if scheme.axis == 1 else arithmetic.T
    chosen = np.abs(decoded(tensor) - array(values))
    assert (chosen <= nearest_error(values, tensor) + arithmetic + np.abs(array(values)) * 2.0**-21).all()


@pytest.mark.parametrize("name", ["w4g32", "nf4g64", "w3g16-asym", "w4g32-axis0"])
@pytest.mark.parametrize(("nested", "bits", "meta"), [("bnb", 8, 40 / 256), ("ggml", 6, 16 / 8), ("w4g64", 4, 16 / 64)])
def test_w7_double_quantized_scales_take_their_bits(name: str, nested: str, bits: int, meta: float) -> None:
    values = random_matrix(["normal"] * 64, 1000, 2)
    plain, tensor = quantize(values, name), quantize(values, f"{name}-dq({nested})")
    scales = plain.dense_scale().numel()
    saved = plain.stored_bits() - tensor.stored_bits()
    assert saved >= scales * (16 - bits) - scales * meta - 64  # 64: the scale and zero point of the last, shorter group
    assert tensor.stored_bits() < plain.stored_bits()


def test_w7_tails_are_double_quantized_too() -> None:
    values = random_matrix(["normal"] * 3, 70, 4)
    tensor = quantize(values, "w4g32-dq(w8g4-asym-sf32)")
    assert isinstance(tensor.scale, QuantizedTensor) and tensor.scale.codes.shape == (1, 9)
    assert tensor.scale.dense_scale().shape == (1, 3)
    relative = (tensor.dense_scale() / quantize(values, "w4g32").dense_scale() - 1).abs()
    assert float(relative.max()) < 0.01
    step = tensor.dense_scale().repeat_interleave(32, dim=1)[:, :70]
    assert bool(((tensor.dequantize() - values).abs() <= step * 0.51 + step * 7 * 0.01).all())


@given(matrices(), schemes())
def test_stored_bits_are_the_sum_of_the_parts(values: Tensor, scheme: QuantScheme) -> None:
    tensor = QuantizedTensor.quantize(values, scheme)
    scales = tensor.dense_scale().numel()
    bits = values.numel() * scheme.bits
    if isinstance(tensor.scale, QuantizedTensor):
        nested = tensor.scale.scheme
        groups = 1 if nested.group is None else -(-scales // nested.group)
        width = tensor.scale.dense_scale().element_size() * 8
        zero_width = width if nested.zero == "float" else nested.bits
        bits += scales * nested.bits + groups * (width + (0 if nested.symmetric else zero_width))
    else:
        bits += scales * tensor.scale.element_size() * 8
    if tensor.zero is not None:
        bits += scales * (scheme.bits if scheme.zero == "integer" else tensor.zero.element_size() * 8)
    assert tensor.stored_bits() == bits


@given(matrices(columns=40), st.sampled_from(["w4g8", "w3g5-asym", "w8g16-asym-fz", "nf4g8", "w4g8-dq"]), st.randoms())
def test_group_index_says_which_group_a_column_is_in(values: Tensor, name: str, random: object) -> None:
    """Columns put in another order, with the index put in that order too, stand for the same numbers."""
    tensor = quantize(values, name)
    columns = values.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    index = torch.arange(columns, dtype=torch.int32) // (tensor.scheme.group or columns)
    moved = replace(tensor, codes=tensor.codes[:, order], group_index=index[order])
    assert torch.equal(moved.dequantize(), tensor.dequantize()[:, order])
    assert moved.stored_bits() == tensor.stored_bits() + 32 * columns


@given(matrices(), schemes(double_quant=False))
def test_rows_are_tensors_of_their_own(values: Tensor, scheme: QuantScheme) -> None:
    tensor = QuantizedTensor.quantize(values, replace(scheme, axis=1))
    part = tensor.rows(slice(1, 3))
    assert torch.equal(part.dequantize(), tensor.dequantize()[1:3])


def test_rows_that_share_scales_are_refused() -> None:
    for name in ("w4g32-axis0", "w4g32-dq"):
        with pytest.raises(ValueError, match="share their scales"):
            quantize(torch.randn(4, 64), name).rows(slice(0, 1))


def test_encoding_on_given_grids() -> None:
    """A grid that does not fit the numbers clamps them, and never wraps."""
    scheme = QuantScheme(code="uint", bits=8, group=2, symmetric=False, scale_dtype=torch.float32)
    parameters = Parameters(torch.tensor([[1.0, 2.0]]), torch.tensor([[0, 128]], dtype=torch.uint8))
    tensor = QuantizedTensor.encode(torch.tensor([[-5.0, 300.0, -1000.0, 1000.0]]), scheme, parameters)
    assert tensor.codes.tolist() == [[0, 255, 0, 255]]
    assert tensor.dequantize().tolist() == [[0.0, 255.0, -256.0, 254.0]]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("codes", torch.zeros(2, 8, dtype=torch.uint8), "codes are a torch.int8 matrix"),
        ("codes", torch.zeros(8, dtype=torch.int8), "codes are a torch.int8 matrix"),
        ("codes", torch.zeros(2, 9, dtype=torch.int8), r"scales are \[2, 3\]"),
        ("scale", torch.zeros(2, 3), r"scales are \[2, 2\], not \[2, 3\]"),
        ("zero", torch.zeros(2, 2, dtype=torch.int8), "zero points are not part"),
        ("group_index", torch.zeros(8, dtype=torch.int64), "group index is int32"),
        ("group_index", torch.zeros(7, dtype=torch.int32), "group index is int32"),
    ],
)
def test_disagreeing_parts_are_refused(field: str, value: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(quantize(torch.randn(2, 8), "w4g4"), **{field: value})


def test_disagreeing_zero_points_and_nested_scales_are_refused() -> None:
    tensor = quantize(torch.randn(2, 8), "w4g4-asym")
    for zero in (None, torch.zeros(2, 2), torch.zeros(2, 3, dtype=torch.uint8)):
        with pytest.raises(ValueError, match="zero points are"):
            replace(tensor, zero=zero)
    nested = quantize(torch.randn(2, 8), "w4g4-dq(w8g4)")
    for scale in (quantize(torch.rand(1, 4), "w8g2"), quantize(torch.rand(1, 5), "w8g4")):
        with pytest.raises(ValueError, match="doubly quantized scales"):
            replace(nested, scale=scale)
