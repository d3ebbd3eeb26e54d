"""Orthonormal matrices: Hadamard's where one is constructed, never anything that is not orthonormal."""

from __future__ import annotations

import pytest
import torch

from bitwright.models.orthogonal import hadamard, make_orthogonal


@pytest.mark.parametrize("size", [1, 2, 3, 4, 7, 12, 20, 22, 24, 28, 36, 48, 60, 80, 96, 104, 112, 128, 192])
def test_rotations_are_orthonormal_and_applied_as_their_matrix_says(size: int) -> None:
    rotation = make_orthogonal(size, seed=5)
    q = rotation.matrix()
    torch.testing.assert_close(q @ q.T, torch.eye(size, dtype=torch.float64), atol=1e-12, rtol=0)
    x = torch.randn(2, 3, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotation.rotate(x), x @ q, atol=1e-12, rtol=0)


def test_hadamard_matrices_are_known_for_the_widths_of_models() -> None:
    for order in (16, 48, 64, 80, 96, 128, 256, 288, 576, 896, 1536):
        matrix = hadamard(order)
        assert matrix is not None and set(matrix.unique().tolist()) == {-1.0, 1.0}, order
        assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))
    for wide in (2048, 2560, 3072, 3584, 4096, 5120, 6656, 8192):  # every entry alike: no random orthonormal matrix
        signs = make_orthogonal(wide, 0)
        first = signs.rotate(torch.eye(1, wide, dtype=torch.float64))
        torch.testing.assert_close(first.abs(), torch.full_like(first, wide**-0.5))
    assert hadamard(7) is None and hadamard(22) is None


def test_the_seed_decides() -> None:
    first, again, other = (make_orthogonal(64, seed).matrix() for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_one_large_channel_is_spread_over_all() -> None:
    x = torch.zeros(96)
    x[17] = 100.0
    assert float(make_orthogonal(96, 0).rotate(x).abs().max()) < 11
