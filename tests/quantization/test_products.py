"""Products of layers that are being tuned: values and derivatives against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bitwright.quantization.products import SMALL, multiply

# Relative to the norm of each result: what float32 sums leave, or one rounding to bf16.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 3e-3}
SHAPES = [((3, 87), 320, 256), ((300,), 192, 331), ((1, 40, 7), 96, 768), ((2, 3), 8, 16), ((1,), 5, 7)]


def _numbers(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _close(found: Tensor | None, expected: Tensor | None) -> bool:
    assert found is not None and expected is not None
    return bool((found.double() - expected).norm() <= BOUNDS[found.dtype] * expected.norm())


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("before", "outputs", "inputs"), SHAPES)
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
def test_values_and_derivatives(
    dtype: torch.dtype, before: tuple[int, ...], outputs: int, inputs: int, has_bias: bool
) -> None:
    shapes = [(*before, inputs), (outputs, inputs), (outputs,)][: 2 + has_bias]
    leaves = [_numbers(*shape, dtype=dtype, seed=seed).requires_grad_() for seed, shape in enumerate(shapes)]
    grad = _numbers(*before, outputs, dtype=dtype, seed=9)
    doubles = [leaf.detach().double().requires_grad_() for leaf in leaves]
    y, expected = multiply(*leaves), torch.nn.functional.linear(*doubles)
    assert y.shape == expected.shape and y.dtype == dtype and _close(y, expected.detach())
    y.backward(grad)
    expected.backward(grad.double())
    assert all(_close(leaf.grad, double.grad) for leaf, double in zip(leaves, doubles, strict=True))


def test_large_products_are_not_left_to_autograd() -> None:
    x, weight = (_numbers(256, 256, dtype=torch.float32, seed=seed) for seed in range(2))
    assert x.numel() * 256 >= SMALL
    for frozen, moving in ((x, weight), (weight, x)):  # one alone has a gradient
        frozen.requires_grad_(False)
        moving.requires_grad_(True)
        y = multiply(x, weight)
        assert y.grad_fn is not None and "_Multiply" in y.grad_fn.name()
        y.sum().backward()
        assert frozen.grad is None and moving.grad is not None
        moving.grad = None


def test_gradients_of_views_and_of_expanded_gradients() -> None:
    """What a backward pass hands over need not be contiguous."""
    x = _numbers(64, 260, 16, dtype=torch.float32, seed=1).transpose(0, 1)[:256].requires_grad_()
    weight = _numbers(16, 128, dtype=torch.float32, seed=2).t().requires_grad_()
    multiply(x, weight).sum().backward()
    assert _close(x.grad, weight.detach().double().sum(0).expand(x.shape))
    assert _close(weight.grad, x.detach().double().sum((0, 1)).expand(128, 16))
