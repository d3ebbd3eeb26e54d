"""Weights whose columns are multiplied and whose rows are divided, natively, and the gradient of their rounding.

What cannot be gone over here is left to plain torch: then the answer is ``None``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.core.memory import use_huge_pages
from bitwright.core.scheme import QuantScheme
from bitwright.kernels import native_library
from bitwright.kernels.native import DTYPES
from bitwright.kernels.native_library import address

if native_library.missing() is None:
    from bitwright.kernels import _native

__all__ = ["pull_back", "scale_weight"]

MAGNITUDE, WITH_ZERO, WIDTH = range(3)  # as in csrc/kernels.h: what the step of a group's grid follows


def scale_weight(weight: Tensor, scale: Tensor | None, divisor: Tensor | None) -> Tensor | None:
    """``weight`` (``[out, in]``) times ``scale`` (``[in]``) over ``divisor`` (``[out]``), in its dtype."""
    if not _is_at_hand(weight):
        return None
    scaled = use_huge_pages(torch.empty(weight.shape, dtype=weight.dtype, device="cpu"))
    rows, columns = weight.shape
    scale, divisor = _vector(scale, columns), _vector(divisor, rows)
    _native.scale_weight(
        weight.data_ptr(), DTYPES[weight.dtype], rows, columns, address(scale), address(divisor), scaled.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return scaled


def pull_back(
    weight: Tensor, scale: Tensor | None, divisor: Tensor | None, rounded: Tensor, grad: Tensor, scheme: QuantScheme
) -> tuple[Tensor, Tensor] | None:
    """From the gradient of a rounded weight (``[out, in]``) to those of ``scale`` and ``divisor``: float32."""
    is_summed = scheme.symmetric and scheme.bits == 1  # its step follows a sum
    given = (weight, rounded, grad)
    if is_summed or scheme.axis == 0 or not all(_is_at_hand(each) and each.dtype == weight.dtype for each in given):
        return None
    rows, columns = weight.shape
    group = columns if scheme.group is None else min(scheme.group, columns)
    range_ = MAGNITUDE if scheme.symmetric or scheme.is_codebook else WIDTH if scheme.zero == "float" else WITH_ZERO
    by_scale = torch.empty(-(-rows // _native.SCALED_ROWS), columns, dtype=torch.float32, device="cpu")
    by_divisor = torch.empty(rows, dtype=torch.float32, device="cpu")
    scale, divisor = _vector(scale, columns), _vector(divisor, rows)
    _native.scaling_gradient(
        weight.data_ptr(), DTYPES[weight.dtype], rows, columns, group, range_, address(scale), address(divisor),
        rounded.data_ptr(), grad.data_ptr(), by_scale.data_ptr(), by_divisor.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return by_scale.sum(0), by_divisor


def _is_at_hand(values: Tensor) -> bool:
    is_known = native_library.missing() is None and values.dtype in DTYPES and values.device.type == "cpu"
    if is_known:
        native_library.instruction_set()
    return is_known and values.is_contiguous() and values.numel() > 0


def _vector(values: Tensor | None, size: int) -> Tensor | None:
    if values is None:
        return None
    if values.shape != (size,):
        raise ValueError(f"a scale of {size} channels has shape [{size}], not {list(values.shape)}")
    return values.detach().to(torch.float32).contiguous()
