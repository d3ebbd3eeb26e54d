"""The reference kernel against float64, for every kind of scheme and shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.core.grid import FitOptions, Parameters
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme, QuantScheme
from bitwright.core.scheme_names import parse
from bitwright.kernels import reference

FLOAT_SCHEMES = [
    *(f"w{bits}g32" for bits in range(1, 9)),
    *(f"w{bits}g32-asym" for bits in range(1, 9)),
    "w4", "w8-asym", "w3g70", "w2g1", "w5g48-asym-signed", "w4g32-sbf16", "w4g32-sf32",
    "w4g32-axis0", "w3-axis0", "w3g7-asym-axis0", "w8g256-asym-signed-axis0",
    "w4g32-asym-fz", "w8-asym-signed-fz", "w4g32-asym-fz-axis0", "a16w8", "a16w4", "a16w4g32",
    "nf4g32", "nf4", "fp4g32", "fp4e2m1g32", "fp8", "fp8g32", "nf4g32-axis0",
    "nf4g64-dq", "w4g32-dq(ggml)", "w4g32-asym-dq", "w4g16-dq(w6g7)", "nf4g32-axis0-dq", "w4g32-asym-axis0-dq(bnb)",
]  # fmt: skip
# (out, in): whole groups, tails, words that end within a row, one row, one column, more than one tile.
SHAPES = [(16, 64), (13, 70), (1, 300), (9, 1), (37, 33), (64, 128)]
# Relative to the sum of |x| |w|: the rounding of sums in float32, of weights and outputs in the 16-bit dtypes.
TOLERANCES = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def quantized(scheme: LayerScheme, shape: tuple[int, int]) -> QuantizedTensor:
    """A random weight whose rows have means of their own."""
    return QuantizedTensor.quantize(torch.randn(shape) + 0.3 * torch.randn(shape[0], 1), scheme.weight)


def check(tensor: QuantizedTensor, scheme: LayerScheme, x: Tensor, bias: Tensor | None) -> None:
    """``run`` equals the float64 product of what is stored, and keeps dtype and leading dimensions."""
    y = reference.run(x, reference.pack(tensor, scheme), bias)
    weight = tensor.dequantize(torch.float64)
    expected = x.double() @ weight.t() + (0 if bias is None else bias.double())
    size = x.double().abs() @ weight.abs().t() + (0 if bias is None else bias.double().abs())
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], tensor.shape[0])
    worst = ((y.double() - expected).abs() / (size + 1e-30)).max() if y.numel() else torch.zeros(())
    assert worst <= TOLERANCES[x.dtype], f"{scheme.name} {tensor.shape} {x.dtype}: {worst}"


@pytest.mark.parametrize("name", FLOAT_SCHEMES)
def test_product_equals_float64(name: str) -> None:
    scheme = parse(name)
    for shape in SHAPES:
        tensor = quantized(scheme, shape)
        for dtype in TOLERANCES:
            check(tensor, scheme, torch.randn(2, 3, shape[1]).to(dtype), torch.randn(shape[0]).to(dtype))
            check(tensor, scheme, torch.randn(1, shape[1]).to(dtype), None)


@pytest.mark.parametrize("name", [*FLOAT_SCHEMES, "w8a8", "a8w8", "a8w4", "w4g32-a8"])
def test_unpack_is_the_inverse_of_pack(name: str) -> None:
    scheme = parse(name)
    for shape in SHAPES:
        tensor = quantized(scheme, shape)
        assert_equal(reference.unpack(reference.pack(tensor, scheme)), tensor)


def assert_equal(left: QuantizedTensor, right: QuantizedTensor) -> None:
    assert left.scheme == right.scheme
    for name in ("codes", "scale", "zero", "group_index"):
        one, other = getattr(left, name), getattr(right, name)
        if isinstance(other, QuantizedTensor):
            assert_equal(one, other)
        elif other is None:
            assert one is None
        else:
            assert one.dtype == other.dtype, name
            assert torch.equal(one, other), name


@given(
    bits=st.integers(1, 8),
    code=st.sampled_from(["int", "uint"]),
    rows=st.integers(1, 9),
    columns=st.integers(1, 67),
    group=st.one_of(st.none(), st.integers(1, 70)),
    axis=st.sampled_from([0, 1]),
    seed=st.integers(0, 2**31),
)
def test_every_code_and_zero_point_survives_packing(
    bits: int, code: str, rows: int, columns: int, group: int | None, axis: int, seed: int
) -> None:
    scheme = QuantScheme(code=code, bits=bits, group=group, axis=axis, symmetric=False)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(seed)
    groups = 1 if group is None else -(-(columns if axis else rows) // group)
    shape = (rows, groups) if axis else (groups, columns)

    def draw(*shape: int) -> Tensor:
        codes = torch.randint(scheme.code_min, scheme.code_max + 1, shape, generator=generator)
        return codes.to(scheme.code_dtype)

    scale = torch.randn(shape, generator=generator).to(torch.float16)
    tensor = QuantizedTensor(scheme=scheme, codes=draw(rows, columns), scale=scale, zero=draw(*shape))
    layer = LayerScheme(weight=scheme)
    packed = reference.pack(tensor, layer)
    assert_equal(reference.unpack(packed), tensor)
    identity = torch.eye(columns)
    assert torch.equal(reference.run(identity, packed), tensor.dequantize().t())


def test_negative_scales_and_the_full_range() -> None:
    scheme = parse("w4g32")
    values = torch.randn(12, 64) - 0.5
    tensor = QuantizedTensor.quantize(values, scheme.weight, FitOptions(symmetric_range="full"))
    assert isinstance(tensor.scale, Tensor)
    assert (tensor.scale < 0).any()
    check(tensor, scheme, torch.randn(5, 64), torch.randn(12))


@pytest.mark.parametrize("name", ["w4g16", "w4g16-asym", "nf4g16", "w4g16-asym-fz", "w4g16-asym-dq"])
def test_group_index(name: str) -> None:
    scheme = parse(name)
    tensor = quantized(scheme, (11, 64))
    index = torch.randint(0, 4, (64,), dtype=torch.int32)
    indexed = replace(tensor, group_index=index)
    assert_equal(reference.unpack(reference.pack(indexed, scheme)), indexed)
    check(indexed, scheme, torch.randn(5, 64), torch.randn(11))
    per_column = tensor.dense_scale().double()[:, index.long()]
    zero = torch.zeros(()) if tensor.zero is None else tensor.zero.double()[:, index.long()]
    if not scheme.weight.is_codebook:
        expected = (tensor.codes.double() - zero) * per_column
        torch.testing.assert_close(indexed.dequantize().double(), expected, rtol=1e-6, atol=1e-7)


def test_tiles_change_nothing_and_bound_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    linear = torch.nn.functional.linear

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        sizes.append(weight.numel())
        return linear(x, weight, bias)

    monkeypatch.setattr(reference.functional, "linear", watched)
    for name in ("w3g32-asym", "w3g32-asym-axis0", "w4g32-dq(ggml)", "nf4"):
        scheme = parse(name)
        tensor = quantized(scheme, (50, 70))
        x, bias, packed = torch.randn(4, 70), torch.randn(50), reference.pack(tensor, scheme)
        monkeypatch.setattr(reference, "TILE", 1 << 20)
        whole = reference.run(x, packed, bias)
        monkeypatch.setattr(reference, "TILE", 500)
        sizes.clear()
        tiled = reference.run(x, packed, bias)
        assert max(sizes) <= 500
        assert sum(sizes) == 50 * 70
        torch.testing.assert_close(tiled, whole, rtol=1e-5, atol=1e-5)


def tensors_of(packed: Mapping[str, Tensor]) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in packed.items()}


def test_doubly_quantized_scales_stay_integers_in_memory() -> None:
    scheme = parse("nf4g32-dq")
    tensor = quantized(scheme, (256, 512))
    packed = reference.pack(tensor, scheme)
    dtypes = tensors_of(packed.tensors)
    assert dtypes["scale.codes"] == torch.int32
    floats = [name for name, dtype in dtypes.items() if dtype.is_floating_point]
    scales = 256 * 512 // 32
    assert sum(packed.tensors[name].numel() for name in floats) <= scales // 256 + 1
    size = sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors.values())
    assert size <= tensor.stored_bits() / 8 + 32


def test_packing_copies_what_it_keeps() -> None:
    """The unpacked codes can be freed: no operand tensor is a view into them, or into a larger one."""
    scheme = parse("w4g32-asym-fz")
    tensor = quantized(scheme, (8, 64))
    packed = reference.pack(tensor, scheme)
    assert isinstance(tensor.scale, Tensor)
    before = reference.unpack(packed).dequantize()
    tensor.scale.zero_()
    assert torch.equal(reference.unpack(packed).dequantize(), before)
    for stored in packed.tensors.values():
        assert stored.untyped_storage().nbytes() == stored.numel() * stored.element_size()


def test_another_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match="w4g32 weight in a w8 layer"):
        reference.pack(quantized(parse("w4g32"), (4, 32)), parse("w8"))


@pytest.mark.parametrize("name", ["w4g32", "w8a8", "w4g32-asym-a8"])
def test_no_rows_give_no_rows(name: str) -> None:
    scheme = parse(name)
    packed = reference.pack(quantized(scheme, (6, 64)), scheme)
    assert reference.run(torch.empty(2, 0, 64), packed).shape == (2, 0, 6)


def test_gradients_reach_the_input() -> None:
    scheme = parse("w4g32")
    tensor = quantized(scheme, (24, 64))
    x = torch.randn(3, 64, requires_grad=True)
    reference.run(x, reference.pack(tensor, scheme)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, tensor.dequantize().sum(0).expand(3, 64))


def test_zero_scales_are_zero_weights() -> None:
    scheme = parse("w4g32")
    parameters = Parameters(torch.zeros(4, 2, dtype=torch.float16), None)
    tensor = QuantizedTensor.encode(torch.zeros(4, 64), scheme.weight, parameters)
    assert torch.equal(reference.run(torch.randn(2, 64), reference.pack(tensor, scheme)), torch.zeros(2, 4))
