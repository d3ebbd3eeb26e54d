"""Scaled weights and the gradients of their rounding: against torch's own arithmetic and float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitwright.core.scheme import QuantScheme
from bitwright.core.scheme_names import parse
from bitwright.kernels import native_library
from bitwright.kernels.native_scaling import pull_back, scale_weight

pytestmark = pytest.mark.skipif(native_library.missing() is not None, reason=str(native_library.missing()))

SHAPES = [(1, 1), (3, 7), (5, 16), (7, 100), (64, 96), (257, 130), (600, 33)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SCHEMES = ["w4g32", "w3g5", "w4-asym", "w2g16-asym", "w4g17-asym-fz", "nf4g24"]


def naive(
    weight: Tensor, scale: Tensor, divisor: Tensor, rounded: Tensor, grad: Tensor, form: QuantScheme
) -> tuple[Tensor, ...]:
    """By autograd in float64 on one expression; extremes in terms of float32, where equal numbers are equal."""
    columns, rows = (vector.double().requires_grad_() for vector in (scale, divisor))
    value = torch.zeros((), dtype=torch.float64)
    size = form.group or weight.shape[1]
    for start in range(0, weight.shape[1], size):
        part = slice(start, start + size)
        scaled = weight[:, part].double() * columns[part] / rows[:, None]
        high, low = scaled.amax(1, keepdim=True), scaled.amin(1, keepdim=True)
        if form.symmetric or form.is_codebook:
            ranges = torch.maximum(high.abs(), low.abs())
        else:
            ranges = high - low if form.zero == "float" else high.clamp(min=0) - low.clamp(max=0)
        residue = rounded[:, part].double() - scaled.detach()
        step = torch.where(ranges.detach() > 0, ranges / ranges.detach().clamp(min=1e-300), torch.zeros(()).double())
        value = value + ((scaled + residue * step) * grad[:, part].double()).sum()
    return torch.autograd.grad(value, (columns, rows))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gradients_are_those_of_one_expression(isa: str, scheme: str, dtype: torch.dtype) -> None:
    form = parse(scheme).weight
    for rows, columns in SHAPES[form.zero == "float" :]:  # a single number has no width, and comes back as it is
        weight, grad = torch.randn(rows, columns).to(dtype), torch.randn(rows, columns).to(dtype)
        scale, divisor = torch.rand(columns) + 0.5, torch.rand(rows) + 0.5
        noise = torch.randn(rows, columns) * 0.1
        rounded = (weight.float() * scale / divisor[:, None] + noise).to(dtype)
        found = pull_back(weight, scale, divisor, rounded, grad, form)
        assert found is not None
        for ours, expected in zip(found, naive(weight, scale, divisor, rounded, grad, form), strict=True):
            bound = 1e-5 * float(expected.norm()) + 1e-4  # sums of float32 numbers of either sign
            assert float((ours.double() - expected).norm()) <= bound


def test_equal_extremes_share_and_empty_groups_have_none() -> None:
    weight = torch.tensor([[2.0, -2.0, 2.0, 0.5, 0.0, 0.0, 0.0, 0.0]])
    grad, rounded = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]]), weight + 0.25
    rounded[0, 4:] = 0
    form = QuantScheme(bits=4, group=4)
    found = pull_back(weight, torch.ones(8), torch.ones(1), rounded, grad, form)
    assert found is not None
    # The range is 2, by 2 and -2 alike, 2 twice: of the pull (1 + 2 + 3 + 4) / 4 / 2 a quarter at each 2, half at -2.
    pull = 10 * 0.25 / 2
    expected = (grad + torch.tensor([[pull / 4, -pull / 2, pull / 4, 0, 0, 0, 0, 0]])) * weight
    torch.testing.assert_close(found[0], expected[0])
    assert float(found[1]) == -float((grad * rounded).sum())


@pytest.mark.parametrize("scheme", ["w4g4", "w4g4-asym", "w4g4-asym-fz"])
def test_least_numbers_that_are_equal_share(scheme: str) -> None:
    weight, form = torch.tensor([[-2.0, 1.0, -2.0, -2.0]]), parse(scheme).weight
    found = pull_back(weight, torch.ones(4), torch.ones(1), weight + 0.25, torch.ones(1, 4), form)
    assert found is not None
    size = 2.0 if form.symmetric else 3.0  # the range, of which the step is a constant part
    pull = torch.full((4,), -4 * 0.25 / size / 3)  # of four residues, to three least numbers
    pull[1] = 0.0 if form.symmetric else 4 * 0.25 / size
    torch.testing.assert_close(found[0], (1 + pull) * weight[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_is_scaled_as_torch_does(isa: str, dtype: torch.dtype) -> None:
    for rows, columns in SHAPES:
        weight = torch.randn(rows, columns).to(dtype)
        scale, divisor = torch.rand(columns) + 0.5, torch.rand(rows) + 0.5
        for by_column, by_row in ((scale, None), (None, divisor), (scale, divisor)):
            expected = weight.float() if by_column is None else weight.float() * by_column
            expected = expected if by_row is None else expected / by_row[:, None]
            found = scale_weight(weight, by_column, by_row)
            assert found is not None and torch.equal(found, expected.to(dtype))


def test_defaults_of_torch_change_nothing() -> None:
    weight, kept = torch.randn(300, 40), torch.get_default_dtype()
    vectors = torch.rand(40) + 0.5, torch.rand(300) + 0.5

    def work() -> list[Tensor | None]:
        found = pull_back(weight, *vectors, weight.round(), weight * 2, QuantScheme(bits=4, group=8))
        return [*(found or ()), scale_weight(weight, *vectors)]

    expected = work()
    try:
        torch.set_default_dtype(torch.float64)
        made = work()
    finally:
        torch.set_default_dtype(kept)
    with torch.device("meta"):
        made += work()
    for ours, theirs in zip(made, expected * 2, strict=True):
        assert ours is not None and theirs is not None and torch.equal(ours, theirs)


def test_threads_change_nothing() -> None:
    weight, kept, made = torch.randn(100_000, 40), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5, 5, 5):
            torch.set_num_threads(threads)
            found = pull_back(
                weight, torch.ones(40), torch.ones(100_000), weight.round(), weight * 2, QuantScheme(bits=4)
            )
            assert found is not None
            made.append(found)
    finally:
        torch.set_num_threads(kept)
    assert all(torch.equal(a, b) for each in made for a, b in zip(each, made[0], strict=True))


def test_what_is_not_for_it_is_left() -> None:
    weight = torch.randn(8, 8)
    for form in (QuantScheme(bits=1), QuantScheme(bits=4, axis=0)):
        assert pull_back(weight, None, None, weight, weight, form) is None
    form = QuantScheme(bits=4)
    assert pull_back(weight, None, None, weight.double(), weight, form) is None
    assert pull_back(weight, None, None, weight.t(), weight, form) is None
    assert scale_weight(weight.double(), None, None) is None
    with pytest.raises(ValueError, match=r"\[8\]"):
        scale_weight(weight, torch.ones(7), None)
