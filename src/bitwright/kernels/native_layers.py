"""What lies between a model's linear layers, natively: norms, gated activations, rotary positions.

Everything is computed in float32 and rounded once, to the dtype of the input. A row's result is the same in any batch.
A norm can be taken where its rows are rounded for a product, in one pass: :func:`norm_linear`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.kernels import native, native_library
from bitwright.kernels.native import DTYPES
from bitwright.kernels.records import PackedWeight

if native_library.missing() is None:
    from bitwright.kernels import _native

__all__ = ["norm_linear", "rms_norm", "rotate", "silu_multiply"]


def rms_norm(x: Tensor, weight: Tensor, epsilon: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The root mean square norm of ``x + residual`` (``[..., columns]``) times ``weight``, and that sum.

    Without a residual the sum is ``x`` itself. (Zhang, Sennrich 2019, equation 4, with epsilon inside the root.)

    Raises:
        ArgumentError: BW201 if shapes, dtypes or layouts are not those described.
    """
    parts = [x] if residual is None else [x, residual]
    _check("x and residual", parts, x.dtype, x.shape)
    _check("weight", [weight], x.dtype, x.shape[-1:])
    y = torch.empty_like(x)
    total = x if residual is None else torch.empty_like(x)
    _native.rms_norm(
        x.data_ptr(), 0 if residual is None else residual.data_ptr(), weight.data_ptr(), total.data_ptr(),
        y.data_ptr(), x.numel() // max(1, x.shape[-1]), x.shape[-1], DTYPES[x.dtype], epsilon, torch.get_num_threads(),
    )  # fmt: skip
    return y, total


def norm_linear(
    x: Tensor,
    norm_weight: Tensor,
    epsilon: float,
    weight: PackedWeight,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The norm of ``x + residual`` (float32 ``[..., in]``) times ``weight``, plus bias: ``[..., out]``; and the sum.

    Bit for bit what :func:`rms_norm` and then the layer give, but a token is normalized, rounded and laid out for the
    product in one go, and its normalized row is nowhere stored.

    Raises:
        ArgumentError: BW201 if shapes, dtypes or layouts are not those described.
        BitwrightError: BW602 if activations that are to be rounded are not finite.
    """
    rows, columns = weight.shape
    parts = [x] if residual is None else [x, residual]
    _check("x and residual", parts, torch.float32, torch.Size((*x.shape[:-1], columns)))
    _check("the norm's weight", [norm_weight], torch.float32, torch.Size((columns,)))
    _check("bias", [] if bias is None else [bias], torch.float32, torch.Size((rows,)))
    y = torch.empty(*x.shape[:-1], rows, dtype=torch.float32, device="cpu")
    total = x if residual is None else torch.empty_like(x)
    is_finite = _native.norm_linear(
        x.data_ptr(), 0 if residual is None else residual.data_ptr(), norm_weight.data_ptr(),
        0 if residual is None else total.data_ptr(), epsilon, native.record(weight), x.numel() // columns,
        0 if bias is None else bias.data_ptr(), *native.rounding(weight), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if not is_finite:
        suggestion = "the model overflows before this layer: load it with dtype float32"
        raise BitwrightError("BW602", "NaN or infinity among the values to quantize", suggestion=suggestion)
    return y, total


def silu_multiply(gate: Tensor, up: Tensor) -> Tensor:
    """``gate * sigmoid(gate) * up``, of two tensors of one shape and dtype.

    Raises:
        ArgumentError: BW201 if shapes, dtypes or layouts differ.
    """
    _check("gate and up", [gate, up], gate.dtype, gate.shape)
    y = torch.empty_like(gate)
    _native.silu_multiply(
        gate.data_ptr(), up.data_ptr(), DTYPES[gate.dtype], gate.numel(), y.data_ptr(), torch.get_num_threads()
    )
    return y


def rotate(x: Tensor, cosine: Tensor, sine: Tensor, positions: Tensor) -> Tensor:
    """Turn ``x`` (``[tokens, heads, dimension]``) in place by the angles of its positions (int32 ``[tokens]``).

    ``cosine`` and ``sine`` are float32 ``[positions, dimension / 2]``. Halves ``(a, b)`` of a head become ``(a cos -
    b sin, b cos + a sin)`` (Su et al. 2021, equation 34, in the order of features that transformers uses).

    Raises:
        ArgumentError: BW201 if shapes, dtypes or layouts are not those described.
        ValueError: if a position has no angles.
    """
    _check("x", [x], x.dtype, x.shape)
    if x.dim() != 3 or x.shape[2] % 2 or cosine.dim() != 2 or cosine.shape[1] != x.shape[2] // 2:
        wanted = "x [tokens, heads, dimension] and cosine [positions, dimension / 2]"
        raise ArgumentError("BW201", f"x is {list(x.shape)}, cosine {list(cosine.shape)}", suggestion=wanted)
    _check("cosine and sine", [cosine, sine], torch.float32, cosine.shape)
    if positions.dtype != torch.int32 or positions.shape != x.shape[:1] or not positions.is_contiguous():
        what = f"positions are {positions.dtype} {list(positions.shape)}"
        raise ArgumentError("BW201", what, suggestion=f"contiguous int32 [{x.shape[0]}]")
    tokens, heads, dimension = x.shape
    _native.rotate(
        x.data_ptr(), DTYPES[x.dtype], tokens, heads, dimension, cosine.data_ptr(), sine.data_ptr(),
        positions.data_ptr(), cosine.shape[0], torch.get_num_threads(),
    )  # fmt: skip
    return x


def _check(names: str, tensors: list[Tensor], dtype: torch.dtype, shape: torch.Size) -> None:
    missing = native_library.missing()
    if missing is not None:
        raise ArgumentError("BW201", missing, suggestion=native_library.BUILD)
    native_library.instruction_set()
    for tensor in tensors:
        sound = tensor.dtype == dtype and dtype in DTYPES and tensor.shape == shape and tensor.dim() > 0
        if not sound or not tensor.is_contiguous() or tensor.device.type != "cpu":
            found = f"{names}: {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            wanted = f"contiguous {dtype} {list(shape)} on the CPU; float32, float16 or bfloat16"
            raise ArgumentError("BW201", found, suggestion=wanted)
