"""The matrix products that second-order rounding lives on: fast float32 ones, and sums of ``x xT`` over tokens.

**Float32.** torch multiplies float32 matrices with MKL, which on some processors takes a slow path; the linear layer of
oneDNN, which torch ships too, reaches about twice that there and is used where it is built in.

**bfloat16 with float32 sums.** A bf16 product on a CPU adds up in float32 but is *returned* rounded to eight bits. That
error, about 2^-9 of each entry, is as large as the damping of a Hessian once activations have a mean. So what is
computed is never the product itself but its difference from a prediction ``P`` known exactly in bf16: ``xT x - P``,
subtracted before the one rounding (the ``beta`` of a GEMM). ``P`` is the mean of the chunks so far; a chunk's own
product, rounded, predicts the first one. Chunks of thousands of tokens differ little, and what is rounded is that
little: the sum is then good to about 3e-5 of ``sqrt(H_ii H_jj)``, against 1.4e-3 without prediction, and its spectral
error is a few 1e-4 of the mean diagonal, dozens of times below the usual damping.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

__all__ = ["GramSum", "multiplies_bfloat16", "product"]

# Tokens gathered before they are multiplied: the deeper a product, the less is stored, and the less chunks differ.
CHUNK_TOKENS = {torch.bfloat16: 4096, torch.float32: 1024}
TILE = 512  # rows and columns of the gram computed at a time; the tiles below the diagonal are left out
WIDE_TILE = 4096  # the same on a GPU, which small products would leave idle
SMALL = 1 << 21  # multiplications below which a plain product is as fast


def multiplies_bfloat16() -> bool:
    """Whether this processor multiplies bf16 matrices with float32 sums, through oneDNN."""
    operators: Any = torch.ops.mkldnn
    return _has_linear() and bool(operators._is_mkldnn_bf16_supported())


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left @ right.T`` of ``[m, k]`` and ``[n, k]`` (float32 or float64): ``[m, n]``, in the fastest way there is.

    ``left`` should be contiguous, and ``right`` too, or the transposed view of a contiguous matrix.
    """
    size = left.shape[0] * left.shape[1] * right.shape[0]
    if left.dtype != torch.float32 or left.device.type != "cpu" or size < SMALL or not _has_linear():
        return left @ right.t()
    operators: Any = torch.ops.mkldnn
    result = operators._linear_pointwise(left, right, None, "none", [], "")
    assert isinstance(result, Tensor)
    return result


def _has_linear() -> bool:
    return bool(torch._C._has_mkldnn) and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@dataclass(slots=True)
class GramSum:
    """``sum(x xT)`` over tokens ``x`` (``[width]``), float32 ``[width, width]``.

    Tokens are gathered into chunks of a fixed number, so that the result does not depend on how they were batched.
    Memory: the sum and one chunk. bf16 tokens of a processor that multiplies bf16 are multiplied as they are; all
    others in float32 (``dtype``, one of the two, overrules that).
    """

    width: int
    dtype: torch.dtype | None = None
    total: Tensor = field(init=False)  # [width, width]; right in the tiles on and above the diagonal until `symmetric`
    _pending: Tensor | None = field(init=False, default=None)  # [width, chunk]: turned, which multiplies faster
    _waiting: int = field(init=False, default=0)  # how many tokens of it are filled
    _chunks: float = field(init=False, default=0.0)  # how many chunks have been added, parts counted as parts
    _is_mirrored: bool = field(init=False, default=False)

    def __post_init__(self) -> None:
        # Pages below the diagonal are not there until written.
        self.total = torch.empty(self.width, self.width, dtype=torch.float32)

    def add(self, tokens: Tensor) -> None:
        """Count ``tokens`` (``[count, width]``, any float dtype)."""
        if self._pending is None:
            dtype = self.dtype or (torch.bfloat16 if _fits_bfloat16(tokens) else torch.float32)
            self._pending = torch.empty(self.width, CHUNK_TOKENS[dtype], dtype=dtype, device=tokens.device)
        if self.total.device != tokens.device:  # the sum lies where the tokens do
            counted = bool(self._chunks)
            self.total = self.total.to(tokens.device) if counted else torch.empty_like(self.total, device=tokens.device)
        while tokens.shape[0]:
            room = self._pending.shape[1] - self._waiting
            part, tokens = tokens[:room], tokens[room:]
            self._pending[:, self._waiting : self._waiting + part.shape[0]] = part.t()
            self._waiting += part.shape[0]
            if self._waiting == self._pending.shape[1]:
                self._multiply()

    def upper(self) -> Tensor:
        """The sum so far, right on and above the diagonal alone."""
        if self._waiting:
            self._multiply()
        self._pending = None
        return self.total

    def symmetric(self) -> Tensor:
        """The sum so far, both halves of it."""
        self.upper()
        if not self._is_mirrored:
            for start in range(0, self.width, TILE):
                end = start + TILE
                self.total[end:, start:end] = self.total[start:end, end:].t()
                corner = self.total[start:end, start:end]
                corner.copy_(corner.triu() + corner.triu(1).t())
            self._is_mirrored = True
        return self.total

    def _multiply(self) -> None:
        """Add the products of the waiting tokens, in tiles on and above the diagonal that stay in cache."""
        assert self._pending is not None
        tokens = self._pending[:, : self._waiting]
        part = self._waiting / self._pending.shape[1]
        if tokens.dtype != torch.bfloat16:
            tokens = tokens.contiguous()
        size = TILE if tokens.device.type == "cpu" else WIDE_TILE
        for start in range(0, self.width, size):
            for other in range(start, self.width, size):
                left, right = tokens[start : start + size], tokens[other : other + size]
                tile = self.total[start : start + size, other : other + size]
                if not self._chunks:
                    tile.zero_()
                if tokens.dtype == torch.bfloat16:
                    _add_bfloat16(tile, left, right, part / self._chunks if self._chunks else None)
                else:
                    tile += product(left, right)
        self._chunks += part
        self._waiting, self._is_mirrored = 0, False


def _add_bfloat16(total: Tensor, left: Tensor, right: Tensor, share: float | None) -> None:
    """Add ``left @ right.T`` to ``total``, of which it is expected to be the ``share``."""
    if share is None:
        predicted = left @ right.t()
    else:
        predicted = torch.empty(total.shape, dtype=torch.bfloat16)
        torch.mul(total, share, out=predicted)
    total += predicted
    total += predicted.addmm_(left, right.t(), beta=-1)


def _fits_bfloat16(tokens: Tensor) -> bool:
    return tokens.dtype == torch.bfloat16 and tokens.device.type == "cpu" and multiplies_bfloat16()
