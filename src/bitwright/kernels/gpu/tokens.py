"""8-bit tokens on the GPU, also straight from the norm before them: the codes are those of ``kernels.integer``."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError
from bitwright.kernels.gpu import library

__all__ = ["LONGEST", "TokenCodes", "TokenLayout", "norm_tokens", "quantize_tokens", "rms_norm"]

LONGEST = 1 << 16  # a row is kept in the registers of one program


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLayout:
    """How a consumer wants tokens: ``slots`` codes a row, the first ``present`` of them the columns in their order or,
    with ``order`` (int32 ``[present]``), that column, or none where it is -1. ``group`` > 0: sums of so many codes."""

    slots: int
    present: int
    group: int = 0
    groups: int = 1
    order: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TokenCodes:
    """``codes`` int8 ``[rows, slots]``, ``scale`` float32 ``[rows]``, ``sums`` of codes int32 ``[rows, groups]``.

    The scale of a row that holds a number that is not finite is NaN, and so is all that is computed with it.
    """

    codes: Tensor
    scale: Tensor
    sums: Tensor


def quantize_tokens(x: Tensor, layout: TokenLayout) -> TokenCodes:
    """Quantize each row of ``x`` (``[rows, columns]``, contiguous) by its own largest absolute value.

    Raises:
        ArgumentError: BW201 if a row is longer than 65,536 numbers.
    """
    found = _room(x.shape[0], layout, x.device)
    width, group = _width(layout)
    library.program("tokens").quantize[(x.shape[0],)](
        x, found.codes if layout.order is None else layout.order, found.codes, found.scale, found.sums,
        x.shape[1], layout.present, layout.slots, layout.groups,
        WIDTH=width, GROUP=group, ORDERED=layout.order is not None, **_options(width),
    )  # fmt: skip
    return found


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The root mean square norm of ``x + residual`` (``[..., columns]``, contiguous) times ``weight``, and that sum.

    Without a residual the sum is ``x`` itself. (Zhang, Sennrich 2019, equation 4, with epsilon inside the root.)
    """
    y = torch.empty_like(x)
    layout = TokenLayout(slots=x.shape[-1], present=x.shape[-1])
    nothing = TokenCodes(y, y, y)
    return y, _normalize(x, weight, epsilon, residual, layout, y, nothing, quantized=False)


def norm_tokens(
    x: Tensor, weight: Tensor, epsilon: float, layout: TokenLayout, residual: Tensor | None = None
) -> tuple[TokenCodes, Tensor]:
    """What :func:`quantize_tokens` makes of :func:`rms_norm`, in one pass; and the sum. Only for columns in order.

    Raises:
        ArgumentError: BW201 for an order of columns, or a row longer than 65,536 numbers.
    """
    if layout.order is not None:
        what = "a norm cannot be fused with columns in another order"
        raise ArgumentError("BW201", what, suggestion="rms_norm, and then quantize_tokens")
    found = _room(x.numel() // x.shape[-1], layout, x.device)
    return found, _normalize(x, weight, epsilon, residual, layout, x, found, quantized=True)


def _normalize(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None, layout: TokenLayout, y: Tensor,
               found: TokenCodes, *, quantized: bool) -> Tensor:  # fmt: skip
    total = x if residual is None else torch.empty_like(x)
    width, group = _width(layout)
    library.program("tokens").normalize[(x.numel() // x.shape[-1],)](
        x, x if residual is None else residual, weight, total, y, found.codes, found.scale, found.sums,
        x.shape[-1], layout.slots, layout.groups, epsilon,
        WIDTH=width, GROUP=group, HAS_RESIDUAL=residual is not None, QUANTIZED=quantized, **_options(width),
    )  # fmt: skip
    return total


def _room(rows: int, layout: TokenLayout, device: torch.device) -> TokenCodes:
    codes = torch.empty(rows, layout.slots, dtype=torch.int8, device=device)
    sums = torch.empty(rows if layout.group else 1, layout.groups, dtype=torch.int32, device=device)
    return TokenCodes(codes, torch.empty(rows, dtype=torch.float32, device=device), sums)


def _width(layout: TokenLayout) -> tuple[int, int]:
    """The power of two that a row is padded to, and the group in whose powers of two it is cut."""
    if layout.slots > LONGEST:
        raise ArgumentError("BW201", f"rows of {layout.slots} numbers", suggestion=f"accepted: at most {LONGEST}")
    width = 1 << max(4, (layout.slots - 1).bit_length())
    return width, min(layout.group, width) if layout.groups > 1 else width if layout.group else 0


def _options(width: int) -> dict[str, int | bool]:
    return {"num_warps": 4 if width <= 2048 else 8 if width <= 8192 else 16, "enable_fp_fusion": False}
