"""The native kernel against float64 and against the reference, on every instruction set that this processor has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme
from bitwright.core.scheme_names import parse
from bitwright.kernels import native, native_library, reference
from bitwright.kernels.records import KernelSpec

pytestmark = pytest.mark.skipif(native_library.missing() is not None, reason="the native kernels are not built")

FLOAT_SCHEMES = [
    *(f"w{bits}g32" for bits in range(1, 9)),
    *(f"w{bits}g64-asym" for bits in range(1, 9)),
    "w4", "w8", "w3", "w8-asym", "w2-asym", "w4g128", "w8g256", "w4g128-asym-signed", "w4g32-sbf16", "w4g32-sf32",
    "w4g32-asym-fz", "w8-asym-signed-fz", "a16w8", "a16w4", "a16w4g32", "nf4g32", "nf4", "fp4g32", "fp4e2m1g64",
    "nf4g64-dq", "w4g32-dq(ggml)", "w4g32-asym-dq", "w1", "w1-asym",
]  # fmt: skip
INTEGER_SCHEMES = [
    "w8a8", "w4a8", "a8w8", "a8w4", "w8-asym-a8", "w8-asym-signed-a8", "w3-asym-a8", "w1-a8", "w1g32-a8", "w1-asym-a8",
    "w4g32-a8", "w4g128-asym-a8", "w4g32-asym-fz-a8", "w8g64-asym-signed-fz-a8", "w4g32-asym-a8-dq", "w2g32-a8",
    "w5g32-a8", "w6g64-a8", "w7-a8", "w2-a8", "w3g32-a8",
]  # fmt: skip
# (out, in): whole panels and blocks, neither, one row, one column, more than a chunk.
SHAPES = [(64, 64), (13, 70), (1, 300), (9, 1), (130, 33), (70, 1100)]
TOKENS = (1, 2, 3, 7, 14)
# Relative to the sum of |x| |w|: float32 sums of up to a thousand numbers; the rounding of y in the 16-bit dtypes.
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def quantized(scheme: LayerScheme, shape: tuple[int, int]) -> QuantizedTensor:
    """A random weight whose rows have means of their own."""
    return QuantizedTensor.quantize(torch.randn(shape) + 0.3 * torch.randn(shape[0], 1), scheme.weight)


def turns(number: int) -> Iterator[tuple[torch.dtype, int]]:
    """Each dtype, and numbers of tokens that differ from shape to shape."""
    for turn, dtype in enumerate(TOLERANCES):
        for tokens in {TOKENS[(number + turn) % 5], TOKENS[(number * turn + 3) % 5]}:
            yield dtype, tokens


def accepts(scheme: LayerScheme, shape: tuple[int, int]) -> bool:
    return native.refuse(KernelSpec(scheme=scheme, shape=shape, device=torch.device("cpu"))) is None


def extent(tensor: QuantizedTensor) -> Tensor:
    """``[out, in]``: each weight's magnitude, or with zero points, which are taken off sums of codes, its grid's."""
    if tensor.scheme.symmetric:
        return tensor.dequantize(torch.float64).abs()
    codes = (tensor.scheme.code_min, tensor.scheme.code_max)
    ends = [replace(tensor, codes=torch.full_like(tensor.codes, code)) for code in codes]
    return torch.maximum(*(end.dequantize(torch.float64).abs() for end in ends))


def check(tensor: QuantizedTensor, scheme: LayerScheme, x: Tensor, bias: Tensor | None) -> None:
    """``run`` equals the float64 product of what is stored, and keeps dtype and leading dimensions."""
    y = native.run(x, native.pack(tensor, scheme), bias)
    weight = tensor.dequantize(torch.float64)
    expected = x.double() @ weight.t() + (0 if bias is None else bias.double())
    size = x.double().abs() @ extent(tensor).t() + (0 if bias is None else bias.double().abs())
    assert y.dtype == x.dtype
    assert y.shape == (*x.shape[:-1], tensor.shape[0])
    floor = 2**-13 if x.dtype == torch.float16 else 1e-30  # below it, float16 has fewer bits
    worst = ((y.double() - expected).abs() / (size + floor)).max()
    where = f"{scheme.name} {tensor.shape} x {list(x.shape)} {x.dtype} on {native_library.instruction_set()}"
    assert worst <= TOLERANCES[x.dtype], f"{where}: {worst}, seed {torch.initial_seed()}"


@pytest.mark.parametrize("name", FLOAT_SCHEMES)
def test_exact_activations_equal_float64(isa: str, name: str) -> None:
    scheme = parse(name)
    for number, shape in enumerate(SHAPES):
        assert accepts(scheme, shape)
        tensor = quantized(scheme, shape)
        for dtype, tokens in turns(number):
            bias = torch.randn(shape[0]).to(dtype) if tokens % 2 else None
            check(tensor, scheme, torch.randn(tokens, shape[1]).to(dtype), bias)


@pytest.mark.parametrize("name", INTEGER_SCHEMES)
def test_rounded_activations_equal_the_reference_bit_for_bit(isa: str, name: str) -> None:
    scheme = parse(name)
    for number, shape in enumerate(SHAPES):
        assert accepts(scheme, shape)
        tensor = quantized(scheme, shape)
        packed, expected = native.pack(tensor, scheme), reference.pack(tensor, scheme)
        for dtype, tokens in turns(number):
            x = torch.randn(tokens, shape[1]).mul(10.0 ** torch.randint(-3, 4, (tokens, 1))).to(dtype)
            bias = torch.randn(shape[0]).to(dtype) if tokens % 2 else None
            where = f"{name} {shape} {tokens} {dtype} {isa}, seed {torch.initial_seed()}"
            assert torch.equal(native.run(x, packed, bias), reference.run(x, expected, bias)), where


@pytest.mark.parametrize("name", ["w4g128", "w8", "w4g32-asym", "w3g64", "w2g32", "nf4g64", "w8a8", "w4g64-asym-fz-a8"])
def test_a_row_does_not_depend_on_its_batch_or_on_threads(name: str) -> None:
    scheme = parse(name)
    tensor = quantized(scheme, (150, 640))
    packed = native.pack(tensor, scheme)
    before = torch.get_num_threads()
    for dtype in TOLERANCES:
        x, bias = torch.randn(500, 640).to(dtype), torch.randn(150).to(dtype)
        together = native.run(x, packed, bias)
        for tokens in (1, 2, 3, 5, 6, 7, 241):
            part = native.run(x[9 : 9 + tokens], packed, bias)
            assert torch.equal(part, together[9 : 9 + tokens]), f"{name} {dtype} {tokens}"
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                for _ in range(3):
                    assert torch.equal(native.run(x, packed, bias), together)
                assert torch.equal(native.run(x[3], packed, bias), together[3])
        finally:
            torch.set_num_threads(before)


@pytest.mark.parametrize(
    "name", ["w4g128", "w8-asym", "w3g32", "nf4g64", "w4g32-a8", "w8a8", "w2g64-asym-a8", "w8-a8g32"]
)
def test_thousands_of_tokens(name: str) -> None:
    """More than are worked on at a time, in each dtype: float64's results, or the reference's."""
    scheme = parse(name)
    tensor = quantized(scheme, (70, 130))
    packed = native.pack(tensor, scheme)
    for dtype, tokens in zip(TOLERANCES, (4096, 4099, 8191), strict=True):
        x = torch.randn(tokens, 130).to(dtype)
        y, row = native.run(x, packed), int(torch.randint(tokens, ()))
        assert torch.equal(native.run(x[row], packed), y[row]), f"{name} {dtype} {row}"
        if scheme.activation is None:
            check(tensor, scheme, x, None)
        else:
            assert torch.equal(y, reference.run(x, reference.pack(tensor, scheme))), f"{name} {dtype}"


@pytest.mark.parametrize(
    "name", ["w4g32-a8", "w4g96-asym-a8", "w4g128-asym-fz-a8", "w8g32-a8", "w8-asym-a8", "w4g256-a8"]
)
def test_every_width_of_tiles_equals_the_reference_bit_for_bit(isa: str, name: str) -> None:
    """Tiles of one to six tokens, of half a panel or a whole one; the last group is shorter than the others."""
    scheme = parse(name)
    tensor = quantized(scheme, (130, 416))
    packed, expected = native.pack(tensor, scheme), reference.pack(tensor, scheme)
    x, bias = torch.randn(25, 416), torch.randn(130)
    together = reference.run(x, expected, bias)
    for tokens in (*range(1, 20), 25):
        assert torch.equal(native.run(x[:tokens], packed, bias), together[:tokens]), (
            f"{tokens}, seed {torch.initial_seed()}"
        )


@pytest.mark.parametrize("name", [*FLOAT_SCHEMES, *INTEGER_SCHEMES])
def test_unpack_is_the_inverse_of_pack(name: str) -> None:
    scheme = parse(name)
    for shape in SHAPES:
        tensor = quantized(scheme, shape)
        assert_equal(native.unpack(native.pack(tensor, scheme)), tensor)


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


@pytest.mark.parametrize("name", ["w4g32", "w4g32-asym", "nf4g32", "w4g32-asym-fz", "w8g32-asym-signed", "w3g32-dq"])
@pytest.mark.parametrize("kind", ["regular", "shuffled", "uneven"])
def test_group_index(isa: str, name: str, kind: str) -> None:
    scheme = parse(name)
    index = torch.arange(128, dtype=torch.int32) // 32
    index = index[torch.randperm(128)] if kind == "shuffled" else index
    index = torch.randint(0, 3, (128,), dtype=torch.int32) if kind == "uneven" else index  # group 3 is empty
    tensor = replace(quantized(scheme, (70, 128)), group_index=index)
    assert_equal(native.unpack(native.pack(tensor, scheme)), tensor)
    for tokens in TOKENS:
        check(tensor, scheme, torch.randn(tokens, 128), torch.randn(70))
    if scheme.weight.is_codebook:
        return
    rounded = replace(scheme, activation=parse("w8a8").activation)
    x = torch.randn(5, 128)
    expected = reference.run(x, reference.pack(tensor, rounded), None)
    assert torch.equal(native.run(x, native.pack(tensor, rounded), None), expected)


def test_special_tokens(isa: str) -> None:
    """Zeros, constants, subnormal and huge numbers are rounded as the reference rounds them."""
    scheme = parse("w8a8")
    tensor = quantized(scheme, (65, 96))
    x = torch.stack([
        torch.zeros(96), torch.full((96,), -3.0), torch.full((96,), 1e-42), torch.randn(96) * 1e-40,
        torch.randn(96) * 1e37, torch.cat([torch.ones(95), torch.tensor([1e30])]), torch.arange(96) + 0.5,
    ])  # fmt: skip
    for bias in (None, torch.randn(65)):
        expected = reference.run(x, reference.pack(tensor, scheme), bias)
        assert torch.equal(native.run(x, native.pack(tensor, scheme), bias), expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_tokens_that_are_not_finite(isa: str, bad: float) -> None:
    for column, tokens in ((0, 1), (69, 1), (33, 9)):
        x = torch.randn(tokens, 70)
        x[-1, column] = bad
        for name in ("w8a8", "w4g32-a8"):
            packed = native.pack(quantized(parse(name), (20, 70)), parse(name))
            with pytest.raises(BitwrightError, match="BW602"):
                native.run(x, packed, None)
        packed = native.pack(quantized(parse("w4g32"), (20, 70)), parse("w4g32"))
        y = native.run(x, packed, None)
        assert not y[-1].isfinite().any()
        assert y[:-1].isfinite().all()


def test_outputs_round_as_torch_rounds() -> None:
    """Identity weights pass numbers through: half to even, and subnormal numbers too, in the 16-bit dtypes."""
    scheme = parse("w8")
    tensor = QuantizedTensor.quantize(torch.eye(64), scheme.weight)
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.randn(33, 64).mul(10.0 ** torch.randint(-9, 5, (33, 64)).float()).clamp(-6e4, 6e4).to(dtype)
        y = native.run(x, native.pack(tensor, scheme), torch.full((64,), 0.0))
        exact = (x.float() * 127) * tensor.dense_scale().float().t()
        assert torch.equal(y, exact.to(dtype))


def test_what_is_refused() -> None:
    for name, shape, reason in (
        ("w4g48", (64, 96), "groups of 48"),
        ("w4g32-axis0", (64, 96), "axis 0"),
        ("fp8", (64, 96), "fp8"),
        ("w8", (64, 70000), "more than 65536"),
    ):
        spec = KernelSpec(scheme=parse(name), shape=shape, device=torch.device("cpu"))
        assert reason in str(native.refuse(spec))
    cuda = KernelSpec(scheme=parse("w4"), shape=(8, 8), device=torch.device("cuda"))
    assert "runs on the CPU" in str(native.refuse(cuda))


def test_gradients_and_other_dtypes_flow() -> None:
    scheme = parse("w4g32")
    tensor = quantized(scheme, (10, 64))
    packed = native.pack(tensor, scheme)
    x = torch.randn(3, 64, requires_grad=True)
    native.run(x, packed, None).sum().backward()
    torch.testing.assert_close(x.grad, tensor.dequantize().sum(0).expand(3, 64), rtol=1e-5, atol=1e-5)
    wide = torch.randn(3, 64, dtype=torch.float64)
    expected = wide @ tensor.dequantize(torch.float64).t()
    torch.testing.assert_close(native.run(wide, packed, None), expected, rtol=1e-6, atol=1e-6)


def test_no_tokens_and_leading_dimensions() -> None:
    scheme = parse("w4g32")
    packed = native.pack(quantized(scheme, (10, 64)), scheme)
    assert native.run(torch.empty(0, 64), packed, None).shape == (0, 10)
    x = torch.randn(2, 3, 64)
    assert torch.equal(native.run(x, packed, None).view(6, 10), native.run(x.view(6, 64), packed, None))
    strided = torch.randn(64, 5).t()
    assert torch.equal(native.run(strided, packed, None), native.run(strided.contiguous(), packed, None))


def test_packed_tensors_of_another_layer_are_refused() -> None:
    scheme = parse("w4g32")
    packed = native.pack(quantized(scheme, (10, 64)), scheme)
    for name in ("codes", "scale"):
        cut = {**packed.tensors, name: packed.tensors[name][:-1]}
        with pytest.raises(ValueError, match="not those of the layer"):
            native.run(torch.randn(1, 64), replace(packed, tensors=cut), None)


def test_a_record_is_kept_until_a_tensor_is_another() -> None:
    scheme, x = parse("w4g32"), torch.randn(1, 64)
    packed = native.pack(quantized(scheme, (10, 64)), scheme)
    assert native.record(packed) is native.record(replace(packed, tensors=dict(packed.tensors)))
    before = native.run(x, packed, None)
    doubled = replace(packed, tensors={**packed.tensors, "scale": packed.tensors["scale"] * 2})
    assert torch.equal(native.run(x, doubled, None), before * 2)
    assert torch.equal(native.run(x, packed, None), before)


@pytest.mark.parametrize(("scheme", "shape"), [("w4g32", (40, 256)), ("w5g32", (256, 256)), ("nf4g64-dq", (256, 256))])
def test_an_operand_that_would_be_larger_than_what_is_stored_is_refused(
    scheme: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """W38: of the size of what is stored, and a tenth more."""
    monkeypatch.setattr(native, "MOST_PADDING", 1.1)
    layer, tensor = parse(scheme), QuantizedTensor.quantize(torch.randn(*shape), parse(scheme).weight)
    spec = KernelSpec(scheme=layer, shape=shape, device=torch.device("cpu"))
    operand = sum(part.nbytes for part in native.pack(tensor, layer).tensors.values())
    is_larger = operand * 8 > max(1.1 * tensor.stored_bits(), tensor.stored_bits() + 128)
    assert (native.refuse(spec) is not None) == is_larger
