"""Orthonormal matrices that spread what is large in one channel over all: Hadamard's where one is known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Orthogonal", "hadamard", "make_orthogonal"]

SMALL = 64  # powers of two are applied in factors of this size, which costs less than one large product


@dataclass(frozen=True, slots=True)
class Orthogonal:
    """``Q = diag(signs) (factors[0] ⊗ factors[1] ⊗ ...)``, orthonormal, ``[n, n]``; all float64."""

    signs: Tensor
    factors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        return self.signs.numel()

    def rotate(self, x: Tensor) -> Tensor:
        """``x Q`` along the last dimension (``[..., n]``), computed in float64 and returned in the dtype of ``x``."""
        rotated = x.to(torch.float64) * self.signs.to(x.device)
        before, after = 1, self.size
        for factor in self.factors:
            count = factor.shape[0]
            after //= count
            rotated = rotated.reshape(-1, before, count, after).transpose(2, 3) @ factor.to(x.device)
            rotated = rotated.transpose(2, 3)
            before *= count
        return rotated.reshape(x.shape).to(x.dtype)

    def matrix(self) -> Tensor:
        """``Q`` itself, float64 ``[n, n]``."""
        return self.rotate(torch.eye(self.size, dtype=torch.float64))


def make_orthogonal(size: int, seed: int) -> Orthogonal:
    """A randomly signed Hadamard matrix of order ``size``; a random orthonormal one where none is constructed.

    Example:
        >>> q = make_orthogonal(96, 0).matrix()
        >>> torch.allclose(q @ q.T, torch.eye(96, dtype=torch.float64))
        True
    """
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).to(torch.float64) * 2 - 1
    power = size & -size  # the largest power of two that divides it
    odd = size // power
    taken = 1 if odd == 1 else next((2**k for k in range(2, 12) if 2**k <= power and _paley(odd * 2**k) is not None), 0)
    if not taken:
        normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
        basis, triangle = torch.linalg.qr(normal)
        return Orthogonal(signs, (basis * triangle.diagonal().sign(),))
    rest = power // taken
    factors = []
    while rest > 1:
        part = min(rest, SMALL)
        factors.append(_sylvester(part) / math.sqrt(part))
        rest //= part
    core = _paley(odd * taken) if odd > 1 else None
    if core is not None:
        factors.append(core / math.sqrt(core.shape[0]))
    return Orthogonal(signs, tuple(factors) or (torch.ones(1, 1, dtype=torch.float64),))


def hadamard(order: int) -> Tensor | None:
    """A matrix of ones and minus ones with orthogonal rows, float64 ``[order, order]``; ``None`` if not constructed."""
    q = make_orthogonal(order, 0)
    found = q.matrix() * q.signs[:, None] * math.sqrt(order)
    return found.round() if torch.allclose(found.abs(), torch.ones_like(found)) else None


def _sylvester(order: int) -> Tensor:
    """The Hadamard matrix of a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < order:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _paley(order: int) -> Tensor | None:
    """Paley's Hadamard matrix: of order q + 1 for primes q = 3 mod 4, of order 2 (q + 1) for primes q = 1 mod 4."""
    if order % 4 or order < 4:
        return None
    prime = order - 1
    if _is_prime(prime):  # q = order - 1 = 3 mod 4; H = I + S with S skew
        return torch.eye(order, dtype=torch.float64) + _conference(prime, -1)
    prime = order // 2 - 1
    if prime % 4 != 1 or not _is_prime(prime):
        return None
    conference, unit = _conference(prime, 1), torch.eye(prime + 1, dtype=torch.float64)
    block = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    diagonal = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, block) + torch.kron(unit, diagonal)


def _conference(prime: int, sign: int) -> Tensor:
    """Paley's conference matrix ``[prime + 1, prime + 1]``: Jacobsthal's with a border of ones and ``sign``."""
    squares = {number * number % prime for number in range(1, prime)}
    character = torch.tensor([0.0 if n == 0 else 1.0 if n in squares else -1.0 for n in range(prime)]).double()
    numbers = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[1:, 1:] = character[(numbers[:, None] - numbers[None, :]) % prime]
    matrix[0, 1:], matrix[1:, 0] = 1.0, float(sign)
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
