"""One factorization for GPTQ: ``H = R RT`` with ``R`` upper triangular, and no inverse of ``H`` at all.

GPTQ (Frantar et al. 2022, section 3.3) is written with ``U``, the upper Cholesky factor of the inverse:
``H^-1 = UT U``. Usually that takes three steps (factor, invert, factor again: 4n^3/3 multiplications and additions).
But with ``H = R RT``, ``R`` upper triangular (a Cholesky factorization that starts at the last row),
``H^-1 = R^-T R^-1``, and ``R^-1`` is upper triangular with a positive diagonal: it *is* ``U``. That takes n^3/3, and
n^3/3 more to invert ``R``. The inversion can be left out as well. Let ``E`` be the errors of GPTQ
(``e_i = (w_i - q_i) / U_ii`` of the updated weight) and ``D = W - Q`` the change of the weights. Every update sums to
``D = E U``, so ``E = D R``, and for the columns ``B`` of a block that starts at ``k``, what all earlier columns
subtracted from them is

    sum_{i<k} e_i U_iB = E_{<k} U_{<k,B} = -D_{<k} R_{<k,B} R_BB^-1

because ``U_{<k,B} = -R_{<k,<k}^-1 R_{<k,B} R_BB^-1``. So the updated weights are ``W_B + (D_{<k} R_{<k,B}) U_BB``, with
``U_BB = R_BB^-1`` the inverse of a small diagonal block. The squared error of the outputs comes with it:
``tr(D H DT) = |D R|^2 = |E|^2``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.quantization.hessian_products import product

__all__ = ["factor_upper", "invert_upper"]

BLOCK = 512
ROWS = 1024  # rows of a panel multiplied at a time, to bound the copies that a fast product needs


def factor_upper(matrix: Tensor) -> bool:
    """Overwrite the upper triangle of ``matrix`` (``[n, n]``, float32 or float64) by ``R``.

    Blocked and left-looking from the last columns to the first, so that a fast product does the work. The matrix is
    given by its upper triangle: what lies below the diagonal blocks is neither read nor written, within them it becomes
    zero. Returns whether the matrix was positive definite; it is spoilt if not.
    """
    count = matrix.shape[0]
    for start in reversed(range(0, count, BLOCK)):
        end = min(start + BLOCK, count)
        if end < count:
            right = matrix[start:end, end:].contiguous()
            for first in range(0, end, ROWS):
                rows = slice(first, min(first + ROWS, end))
                matrix[rows, start:end] -= product(matrix[rows, end:].contiguous(), right)
        corner = matrix[start:end, start:end]
        # Turned about both diagonals the upper triangle becomes the lower one, which is all that is read.
        lower, info = torch.linalg.cholesky_ex(corner.flip(0, 1))
        if int(info) or not torch.isfinite(lower.diagonal()).all():
            return False
        corner.copy_(lower.flip(0, 1))
        if start:
            matrix[:start, start:end] = product(matrix[:start, start:end].contiguous(), invert_upper(corner))
    return True


def invert_upper(corner: Tensor) -> Tensor:
    """The inverse of a small upper triangular matrix (what lies below its diagonal is not looked at)."""
    identity = torch.eye(corner.shape[0], dtype=corner.dtype, device=corner.device)
    inverse: Tensor = torch.linalg.solve_triangular(corner, identity, upper=True)
    return inverse
