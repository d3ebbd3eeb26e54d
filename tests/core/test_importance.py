"""Laws of the search that weighs columns: against the weighted error in float64, and against the plain search."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from bitwright.core import grid
from bitwright.core.errors import ArgumentError
from bitwright.core.grid import SHRINK_RATIOS, FitOptions
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme
from bitwright.core.scheme_names import parse
from tests.core.restatement import TINY, array, decoded, group_of
from tests.core.strategies import matrices, random_matrix, schemes

plain_schemes = schemes(double_quant=False)
SEARCH = FitOptions(search=True)


def same(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    zeros = one.zero is other.zero is None or (
        one.zero is not None and other.zero is not None and torch.equal(one.zero, other.zero)
    )
    return torch.equal(one.codes, other.codes) and torch.equal(one.dense_scale(), other.dense_scale()) and zeros


def random_importance(columns: int, seed: int) -> Tensor:
    """Over many orders of magnitude, a quarter of it zero."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-12, 6, (columns,), generator=generator).float()
    return torch.rand(columns, generator=generator) * 10**exponents * (torch.rand(columns, generator=generator) > 0.25)


def weighted_errors(values: Tensor, tensor: QuantizedTensor, importance: Tensor) -> np.ndarray:
    """``[rows, groups]``, float64; a group without importance counts all columns alike."""
    squares = np.square(decoded(tensor) - array(values))
    index, weights = group_of(tensor.scheme, values.shape[1]), array(importance)
    errors = []
    for g in range(index[-1] + 1):
        part = weights[index == g]
        part = part / part.max() if part.max() > 0 else np.ones_like(part)
        errors.append((squares[:, index == g] * part).sum(1))
    return np.stack(errors, axis=1)


@settings(max_examples=60)
@given(matrices(), plain_schemes, st.integers(0, 2**32 - 1))
def test_weighted_search_is_never_worse_than_none(values: Tensor, scheme: QuantScheme, seed: int) -> None:
    if scheme.axis == 0:
        return  # every group lies within one column
    importance = random_importance(values.shape[1], seed)
    wide = QuantizedTensor.quantize(values, scheme)
    searched = QuantizedTensor.quantize(values, scheme, SEARCH, importance=importance)
    if wide.dense_scale().dtype != searched.dense_scale().dtype:
        return  # a shrunk scale may need float32 where the whole one does not
    was, now = (weighted_errors(values, tensor, importance) for tensor in (wide, searched))
    size = np.square(array(values)).sum(1, keepdims=True)
    assert (now <= was * (1 + 1e-5) + size * 1e-12 + TINY**2).all()


@given(matrices(), schemes(), st.sampled_from([0.0, 1e-44, 3e-7, 1.0, 7.5, 3e38]))
def test_constant_importance_changes_nothing(values: Tensor, scheme: QuantScheme, size: float) -> None:
    plain = QuantizedTensor.quantize(values, scheme, SEARCH)
    importance = torch.full((values.shape[1],), size)
    assert same(plain, QuantizedTensor.quantize(values, scheme, SEARCH, importance=importance))


@given(matrices(), schemes(), st.integers(0, 2**32 - 1))
def test_importance_matters_only_to_a_search(values: Tensor, scheme: QuantScheme, seed: int) -> None:
    importance = random_importance(values.shape[1], seed)
    before = importance.clone()
    assert same(
        QuantizedTensor.quantize(values, scheme), QuantizedTensor.quantize(values, scheme, importance=importance)
    )
    QuantizedTensor.quantize(values, scheme, SEARCH, importance=importance)
    assert torch.equal(importance, before)


@pytest.mark.parametrize("name", ["w3g40", "w4g128", "w3g40-asym", "w2", "nf4g64"])
def test_the_best_of_all_ratios_is_found(name: str) -> None:
    """Every ratio tried by hand, for normal numbers with a tail group."""
    values, scheme = random_matrix(["normal", "outlier", "normal"], 300, 3), parse(f"{name}-sf32").weight
    importance = random_importance(300, 4)
    found = QuantizedTensor.quantize(values, scheme, SEARCH, importance=importance)
    errors = weighted_errors(values, found, importance)
    least = np.full_like(errors, np.inf)
    low, high, mean = grid._ranges(values, scheme)
    for ratio in SHRINK_RATIOS:
        scale = grid._scale(low * ratio, high * ratio, mean * ratio, scheme, SEARCH)
        parameters = grid.Parameters(scale, grid._zero(low * ratio, high * ratio, scale, scheme))
        tried = QuantizedTensor.encode(values, scheme, parameters)
        least = np.minimum(least, weighted_errors(values, tried, importance))
    np.testing.assert_allclose(errors, least, rtol=1e-4)


def test_importance_pays_where_it_is_uneven() -> None:
    values, scheme = random_matrix(["normal"] * 32, 128, 1), parse("w3g128").weight
    importance = random_importance(128, 2)
    plain, weighted = (
        weighted_errors(values, QuantizedTensor.quantize(values, scheme, SEARCH, importance=weights), importance).sum()
        for weights in (None, importance)
    )
    assert weighted < 0.8 * plain


@pytest.mark.parametrize(
    "importance",
    [
        torch.ones(7),
        torch.ones(1, 8),
        torch.full((8,), -1.0),
        torch.full((8,), float("nan")),
        torch.full((8,), 1e300, dtype=torch.float64),
    ],
)
def test_wrong_importance_is_refused_by_name(importance: Tensor) -> None:
    with pytest.raises(ArgumentError, match=r"BW201.*importance") as caught:
        QuantizedTensor.quantize(torch.randn(2, 8), parse("w4").weight, SEARCH, importance=importance)
    assert "[8]" in str(caught.value)
