"""Weights between float and integer: equal to what is stored, and their gradients equal to autograd's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitwright.core.grid import FitOptions
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme
from bitwright.core.scheme_names import parse
from bitwright.quantization.fake_quant import CodeWeight, OffsetWeight, can_follow

SCHEMES = (
    "w4g32",
    "w4",
    "w2g16-asym",
    "w3g32-asym",
    "w8g32-asym",
    "w4g32-asym-axis0",
    "w3g32-axis0",
    "w4g32-asym-sbf16",
)


def scheme_of(name: str) -> QuantScheme:
    return parse(name).weight


def draw(out: int = 24, columns: int = 72, seed: int = 0) -> Tensor:
    """A weight with groups of every kind: mixed, one-sided, constant, zero, of huge and of tiny numbers."""
    weight = torch.randn(out, columns, generator=torch.Generator().manual_seed(seed))
    weight[0] = weight[0].abs()
    weight[1] = -weight[1].abs()
    weight[2] = 0.25
    weight[3] = 0.0
    weight[4] = -0.75
    weight[5] *= 1e3
    weight[6] *= 1e-3
    return weight


def naive_offset(weight: Tensor, scheme: QuantScheme, offset: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Equations 3 and 4 of SignRound for asymmetric groups that divide the row, by autograd alone; rounding and its
    clamp are straight-through as in the paper."""
    out, columns = weight.shape
    view = weight.view(out, -1, scheme.group or columns)
    lows, highs = view.amin(-1).clamp(max=0) * low, view.amax(-1).clamp(min=0) * high
    scale = ((highs - lows) / (2**scheme.bits - 1)).unsqueeze(-1)
    zero = -lows.unsqueeze(-1) / scale
    zero = zero + (zero.round() - zero).detach()
    scaled = view / scale + offset.view_as(view)
    codes = (scaled + (scaled.round() - scaled).detach() + zero).clamp(0, 2**scheme.bits - 1)
    return ((codes - zero) * scale).view_as(weight)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("spread", ["restricted", "full", "centred"])
def test_without_offsets_it_is_rounding_to_nearest(kernels: str, name: str, spread: str) -> None:
    scheme, weight, fit = scheme_of(name), draw(), FitOptions(symmetric_range=spread)  # type: ignore[arg-type]
    expected = QuantizedTensor.quantize(weight, scheme, fit)
    follower = OffsetWeight(weight, scheme, fit)
    found = follower.tensor()
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.dense_scale(), expected.dense_scale())
    assert found.zero is None if expected.zero is None else torch.equal(found.zero, expected.zero)  # type: ignore[arg-type]
    assert torch.equal(follower.decode(), expected.dequantize())


@pytest.mark.parametrize("name", SCHEMES)
def test_what_is_trained_is_what_is_stored(kernels: str, name: str) -> None:
    scheme, weight = scheme_of(name), draw(seed=1)
    follower = OffsetWeight(weight, scheme)
    generator = torch.Generator().manual_seed(2)
    follower.offset = torch.rand(follower.offset.shape, generator=generator) - 0.5
    follower.low = torch.rand(follower.low.shape, generator=generator)
    follower.high = torch.rand(follower.high.shape, generator=generator)
    assert torch.equal(follower.decode(), follower.tensor().dequantize())


@pytest.mark.parametrize("name", ["w4g24-asym-sf32", "w2g72-asym-sf32", "w3g24-asym-sf32"])
def test_gradients_of_offsets_and_ranges_are_those_of_autograd(kernels: str, name: str) -> None:
    scheme, weight = scheme_of(name), draw(seed=3)[7:]  # groups of one number have a grid of their own
    follower = OffsetWeight(weight, scheme)
    generator = torch.Generator().manual_seed(4)
    follower.offset = torch.rand(weight.shape, generator=generator) - 0.5
    follower.low = 0.5 + 0.5 * torch.rand(follower.low.shape, generator=generator)
    follower.high = 0.5 + 0.5 * torch.rand(follower.high.shape, generator=generator)
    upstream = torch.randn(weight.shape, generator=generator)
    leaves = [each.double().requires_grad_() for each in (follower.offset, follower.low, follower.high)]
    naive = naive_offset(weight.double(), scheme, *leaves)
    torch.testing.assert_close(follower.decode().double(), naive, rtol=1e-5, atol=1e-5)
    expected = torch.autograd.grad(naive, leaves, upstream.double())
    found = follower.gradients(upstream)
    for ours, theirs in zip((found.offset, found.low, found.high), expected, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_goes_against_the_sign_of_the_gradient(kernels: str, name: str, dtype: torch.dtype) -> None:
    follower = OffsetWeight(draw(seed=5).to(dtype), scheme_of(name))
    generator = torch.Generator().manual_seed(6)
    follower.offset = torch.rand(follower.offset.shape, generator=generator) - 0.5
    upstream = torch.randn(draw().shape, generator=generator).to(dtype)
    before, stored, gradients = follower.decode(dtype), follower.tensor(), follower.gradients(upstream)
    expected = follower.offset.sub(gradients.offset.sign(), alpha=0.3).clamp(-0.5, 0.5)
    by_low, by_high = follower.step(upstream, 0.3)
    assert torch.equal(follower.offset, expected)
    torch.testing.assert_close(by_low, gradients.low, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(by_high, gradients.high, rtol=1e-4, atol=1e-4)
    again = follower.decode(dtype, into=before)  # over what was there
    assert torch.equal(again, follower.tensor(into=stored).dequantize(dtype))
    assert torch.equal(again, follower.decode(dtype))
    assert torch.equal(again, follower.tensor().dequantize(dtype))


def test_gradients_of_a_symmetric_range_go_to_its_larger_end(kernels: str) -> None:
    scheme, weight = QuantScheme(bits=4, group=None, scale_dtype=torch.float32), torch.tensor([[-2.0, 1.1, 0.4]])
    follower = OffsetWeight(weight, scheme)
    upstream = torch.tensor([[1.0, 2.0, 4.0]])
    scale = 2 / 7
    codes = torch.tensor([[-7.0, 4.0, 1.0]])
    expected = ((codes - weight / scale) * upstream).sum() * scale
    found = follower.gradients(upstream)
    assert found.high.item() == 0
    assert found.low.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_clamped_weight_has_no_gradient(kernels: str) -> None:
    scheme = QuantScheme(bits=2, group=None, scale_dtype=torch.float32)
    follower = OffsetWeight(torch.tensor([[2.0, -0.6]]), scheme)
    follower.high *= 0.4  # the range ends at 0.8: the first number lies outside
    found = follower.gradients(torch.ones(1, 2)).offset
    assert found[0, 0] == 0
    assert found[0, 1] != 0


@pytest.mark.parametrize("name", [*SCHEMES, "nf4g32", "fp4bnbg32", "w4g32-asym-fz", "w1g32"])
def test_codes_start_as_the_rounder_left_them(name: str) -> None:
    scheme, weight = scheme_of(name), draw(seed=5)
    tensor = QuantizedTensor.quantize(weight * 0.8, scheme)  # other codes than the weight's own nearest
    for follower in (CodeWeight(tensor), CodeWeight(tensor, weight, moving=True)):
        assert torch.equal(follower.decode(), tensor.dequantize())
        again = follower.tensor()
        assert torch.equal(again.codes, tensor.codes)
        assert torch.equal(again.dense_scale(), tensor.dense_scale())


def test_columns_of_any_order_keep_their_groups() -> None:
    scheme = QuantScheme(bits=4, group=4, symmetric=False, code="uint", scale_dtype=torch.float32)
    index = torch.tensor([0, 1, 1, 0, 2, 2, 0, 1, 2, 0, 1, 2], dtype=torch.int32)
    codes = torch.randint(0, 16, (5, 12), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    scale = torch.rand(5, 3) + 0.1
    tensor = QuantizedTensor(
        scheme=scheme, codes=codes, scale=scale, zero=torch.full((5, 3), 7, dtype=torch.uint8), group_index=index
    )
    follower = CodeWeight(tensor)
    assert torch.equal(follower.decode(), tensor.dequantize())
    upstream = torch.randn(5, 12)
    expected = torch.zeros(5, 3).index_add_(1, index.long(), (codes.float() - 7) * upstream) * scale
    torch.testing.assert_close(follower.gradients(upstream).scale, expected)


def test_gradients_of_codes_scales_and_zero_points_are_those_of_autograd() -> None:
    scheme = scheme_of("w3g24-asym-fz-sf32")
    weight = draw(seed=6)[7:]
    tensor = QuantizedTensor.quantize(weight, scheme)
    follower = CodeWeight(tensor, weight, moving=True)
    assert follower.position is not None
    assert follower.zero is not None
    generator = torch.Generator().manual_seed(7)
    follower.position += torch.randn(weight.shape, generator=generator)
    follower.scale *= 1 + 0.1 * torch.randn(follower.scale.shape, generator=generator)
    follower.zero += 0.1
    upstream = torch.randn(weight.shape, generator=generator)
    moved = (follower.position, follower.scale, follower.zero)
    position, scale, zero = leaves = [each.double().requires_grad_() for each in moved]
    codes = (position + (position.round() - position).detach()).clamp(scheme.code_min, scheme.code_max)
    assert tensor.zero is not None
    points = (tensor.zero.double() + zero).unsqueeze(-1)
    spread = (codes.view(17, 3, 24) - points) * (tensor.dense_scale() * scale).unsqueeze(-1)
    torch.testing.assert_close(follower.decode().double(), spread.view_as(weight), rtol=1e-5, atol=1e-6)
    expected = torch.autograd.grad(spread.view_as(weight), leaves, upstream.double())
    found = follower.gradients(upstream)
    for ours, theirs in zip((found.position, found.scale, found.zero), expected, strict=True):
        assert ours is not None
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-5)


def test_moved_codes_are_stored_as_they_were_trained() -> None:
    for name in ("w3g24-asym", "w4g24-asym-fz", "w4g24-dq(w8g256-asym)", "w4g24-axis0"):
        weight = draw(seed=8)
        follower = CodeWeight(QuantizedTensor.quantize(weight, scheme_of(name)), weight, moving=True)
        assert follower.position is not None
        follower.position += torch.randn(follower.position.shape, generator=torch.Generator().manual_seed(9))
        if follower.zero is not None:
            follower.zero += 0.37
        if name != "w4g24-dq(w8g256-asym)":
            follower.scale *= 1.031
        assert torch.equal(follower.decode(), follower.tensor().dequantize()), name


def test_a_position_starts_between_its_code_and_the_float_weight() -> None:
    scheme = QuantScheme(bits=4, group=None, scale_dtype=torch.float32)
    weight = torch.tensor([[0.7, 0.33, -0.21]])
    tensor = QuantizedTensor.quantize(weight, scheme)
    follower = CodeWeight(tensor, weight, moving=True)
    assert follower.position is not None
    expected = torch.tensor([[7.0, 3 + 0.3 / 1.3, -2 - 0.1 / 1.1]])
    torch.testing.assert_close(follower.position, expected, rtol=1e-4, atol=1e-4)
    far = CodeWeight(QuantizedTensor.quantize(weight * 0.2, scheme), weight, moving=True)
    assert torch.equal(far.decode(), QuantizedTensor.quantize(weight * 0.2, scheme).dequantize())


def test_which_grids_offsets_can_follow() -> None:
    assert all(can_follow(scheme_of(name)) for name in SCHEMES)
    refused = ("nf4g32", "w4g32-asym-fz", "w1g32", "w4g32-dq(w8g256-asym)")
    assert not any(can_follow(scheme_of(name)) for name in refused)
    with pytest.raises(ValueError, match="nf4g32"):
        OffsetWeight(draw(), scheme_of("nf4g32"))


@pytest.mark.parametrize("name", ["w4g24-asym", "w3g24-axis0"])
def test_a_transposed_weight_is_as_good_as_any(name: str) -> None:
    """That of GPT-2's Conv1D, whose numbers do not lie in the order of rows."""
    weight, upstream = draw(seed=10), draw(seed=11)
    turned = weight.t().contiguous().t()
    ours, theirs = OffsetWeight(turned, scheme_of(name)), OffsetWeight(weight, scheme_of(name))
    assert torch.equal(ours.decode(), theirs.decode())
    found = ours.gradients(upstream.t().contiguous().t())
    assert torch.equal(found.offset, theirs.gradients(upstream).offset)
    tensor = QuantizedTensor.quantize(weight * 0.9, scheme_of(name))
    ours_too, theirs_too = (CodeWeight(tensor, each, moving=True) for each in (turned, weight))
    assert torch.equal(ours_too.position, theirs_too.position)  # type: ignore[arg-type]
