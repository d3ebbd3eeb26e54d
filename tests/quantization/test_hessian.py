"""Grams of calibration tokens, their factorization, and what is exact about them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from bitwright.core.scheme_names import parse
from bitwright.quantization import hessian_products
from bitwright.quantization.cholesky import factor_upper, invert_upper
from bitwright.quantization.gptq import GptqOptions, round_by_error_feedback
from bitwright.quantization.gptq_order import arrange
from bitwright.quantization.gptq_solver import output_error
from bitwright.quantization.hessian import factor_hessian, importance_of
from bitwright.quantization.hessian_products import GramSum, multiplies_bfloat16, product
from bitwright.quantization.statistics import SiteStatistics
from tests.quantization.gptq_restatement import correlated_site, hessian, squared_error, textbook_factor

needs_bfloat16 = pytest.mark.skipif(not multiplies_bfloat16(), reason="this processor does not multiply bf16")


def activations(tokens: int, width: int, *, seed: int = 0) -> Tensor:
    """bf16 activations with a mean that makes up most of the gram, and channels of very different strength."""
    generator = torch.Generator().manual_seed(seed)
    mixture = torch.randn(width, width, generator=generator) / width**0.5
    strength = torch.rand(width, generator=generator).pow(3) * 5
    mean = torch.randn(width, generator=generator) * 2
    return ((torch.randn(tokens, width, generator=generator) * strength) @ mixture + mean).to(torch.bfloat16)


def shorten_chunks(monkeypatch: pytest.MonkeyPatch, tokens: int) -> None:
    monkeypatch.setattr(hessian_products, "CHUNK_TOKENS", {torch.bfloat16: tokens, torch.float32: tokens})


def exact_gram(tokens: Tensor) -> Tensor:
    return tokens.double().T @ tokens.double()


def relative_error(gram: Tensor, exact: Tensor) -> tuple[float, float]:
    """The largest error in units of ``sqrt(H_ii H_jj)``, and the spectral norm of it in units of the mean diagonal."""
    size = exact.diagonal().sqrt()
    error = gram.double() - exact
    norm = torch.linalg.matrix_norm(error, 2) / exact.diagonal().mean()
    return float((error.abs() / (size[:, None] * size)).max()), float(norm)


@needs_bfloat16
def test_bf16_tokens_are_summed_exactly_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_chunks(monkeypatch, 1024)
    tokens = activations(12_000, 192)  # eleven full chunks and a part
    total = GramSum(192)
    total.add(tokens)
    exact = exact_gram(tokens)
    entry, norm = relative_error(total.symmetric(), exact)
    assert entry < 1e-4 and norm < 1e-3
    rounded = sum((part.T @ part).double() for part in tokens.split(1024))
    assert isinstance(rounded, Tensor)
    plain_entry, plain_norm = relative_error(rounded, exact)
    assert plain_entry > 5 * entry and plain_norm > 5 * norm  # what the prediction is for


@needs_bfloat16
@pytest.mark.parametrize("scheme", ["w4g32", "w2g32-asym"])
def test_bf16_grams_round_weights_as_well_as_exact_ones(scheme: str) -> None:
    tokens, weight = activations(16_384, 128), torch.randn(1024, 128, generator=torch.Generator().manual_seed(1)) * 0.05
    errors = []
    for dtype in (torch.bfloat16, torch.float32):
        site = SiteStatistics(128, with_gram=True, gram_dtype=dtype)
        site.add(tokens)
        tensor = round_by_error_feedback(weight, site, parse(scheme).weight, GptqOptions()).tensor
        errors.append(squared_error(weight, tensor.dequantize(), exact_gram(tokens).numpy()))
    # Where a weight lies between two codes it may go either way, and those that follow make up for it: the same error
    # comes out of other codes. What differs between two ways is noise that falls with the number of rows.
    assert errors[0] == pytest.approx(errors[1], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_sum_does_not_depend_on_how_tokens_are_batched(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    shorten_chunks(monkeypatch, 128)
    tokens = activations(1000, 48).to(dtype)
    whole = SiteStatistics(48, with_gram=True)
    whole.add(tokens[None])
    assert whole.gram is not None
    for size in (1, 7, 128, 333):
        parts = SiteStatistics(48, with_gram=True)
        for start in range(0, 1000, size):
            parts.add(tokens[start : start + size])
        assert parts.gram is not None and torch.equal(parts.gram, whole.gram) and parts.tokens == 1000
        torch.testing.assert_close(parts.sum_of_squares, whole.sum_of_squares, rtol=1e-6, atol=0)
        torch.testing.assert_close(parts.sum_of_magnitudes, whole.sum_of_magnitudes, rtol=1e-6, atol=0)
        assert torch.equal(parts.largest, whole.largest)


def test_float32_tokens_are_multiplied_in_float32_unless_told_otherwise() -> None:
    tokens = torch.randn(500, 40, generator=torch.Generator().manual_seed(0))
    exact = tokens.double().T @ tokens.double()
    site, narrow = SiteStatistics(40, with_gram=True), SiteStatistics(40, with_gram=True, gram_dtype=torch.bfloat16)
    site.add(tokens)
    narrow.add(tokens)
    assert site.gram is not None and narrow.gram is not None
    assert relative_error(site.gram, exact)[0] < 1e-6 < 1e-4 < relative_error(narrow.gram, exact)[0]


def test_a_gram_can_be_read_and_added_to_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hessian_products, "TILE", 16)
    for dtype in (torch.float32, torch.bfloat16):
        tokens = activations(300, 50).to(dtype)
        site = SiteStatistics(50, with_gram=True)
        assert site.gram is not None and not site.gram.any()
        for start in range(0, 300, 100):
            site.add(tokens[start : start + 100])
            assert site.gram is not None and torch.equal(site.gram, site.gram.T)
            assert relative_error(site.gram, exact_gram(tokens[: start + 100]))[0] < 1e-3


def test_the_fast_product_is_a_product() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns, depth in [(130, 128, 300), (128, 130, 2000), (3, 5, 7), (300, 300, 1)]:
        left, right = torch.randn(rows, depth, generator=generator), torch.randn(columns, depth, generator=generator)
        exact = (left.double() @ right.double().T).float()
        torch.testing.assert_close(product(left, right), exact, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(product(left, right.T.contiguous().T), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("size", [1, 5, 511, 512, 513, 1100])
def test_one_reversed_factorization_gives_the_factor_of_the_inverse(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    root = torch.randn(size, size + 10, generator=generator, dtype=torch.float64)
    matrix = root @ root.T / size + 0.1 * torch.eye(size, dtype=torch.float64)
    factor = matrix.clone()
    assert factor_upper(factor)
    upper = factor.triu()
    torch.testing.assert_close(upper @ upper.T, matrix, rtol=1e-10, atol=1e-10)
    inverse = textbook_factor(matrix.numpy())
    np.testing.assert_allclose(invert_upper(factor).numpy(), inverse, rtol=1e-7, atol=1e-9)
    single = matrix.float()
    assert factor_upper(single)
    torch.testing.assert_close(single.triu().double(), upper, rtol=1e-3, atol=1e-4)


def test_a_matrix_that_is_not_positive_definite_is_noticed() -> None:
    for size, place in [(40, 0), (40, 39), (1200, 3), (1200, 1199)]:
        matrix = torch.eye(size)
        matrix[place, place] = -1
        assert not factor_upper(matrix)
    for broken in (float("nan"), float("inf")):
        assert not factor_upper(torch.full((4, 4), broken))


@pytest.mark.parametrize("dead", [(), (0, 7, 8, 63, 89)], ids=["all live", "some dead"])
@pytest.mark.parametrize("order", [{}, {"act_order": True}, {"group_aware": True}], ids=str)
def test_the_error_is_that_of_the_outputs(order: dict[str, bool], dead: tuple[int, ...]) -> None:
    flags = {"act_order": False, "group_aware": False, "static_groups": False} | order
    for width in (90, 600):
        site = correlated_site(width, tokens=width * 2, dead=dead)
        arranged = arrange(importance_of(site), parse("w4g32").weight, **flags)
        factor = factor_hessian(site, arranged, 0.01)
        assert factor is not None
        change = torch.randn(12, width, generator=torch.Generator().manual_seed(0))
        columns = torch.arange(width) if arranged.columns is None else arranged.columns
        exact = squared_error(change, torch.zeros_like(change), hessian(site))
        assert output_error(change.T[columns].contiguous(), factor) == pytest.approx(exact, rel=1e-4)
