"""The equations of quantization written again, plainly and in float64, so that the tests do not ask the code itself."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme

__all__ = ["TINY", "array", "code_values", "decoded", "group_of", "grouped", "nearest_error", "plain_scale"]

TINY = 2.0**-126  # the smallest normal float32

NF4 = [
    *[-1, -0.6961928, -0.5250730, -0.3949174, -0.2844413, -0.1847734, -0.0910500, 0],
    *[0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1],
]
BNB = [0, 0.0625, 8, 12, 4, 6, 2, 3]


def _small_float(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """The value of a sign-exponent-mantissa code, from the bits."""
    mantissa = code & ((1 << mantissa_bits) - 1)
    exponent = (code >> mantissa_bits) & ((1 << exponent_bits) - 1)
    sign = -1.0 if code >> (mantissa_bits + exponent_bits) else 1.0
    if exponent == 0:
        return sign * mantissa / (1 << mantissa_bits) * 2.0 ** (1 - bias)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


def code_values(scheme: QuantScheme) -> tuple[np.ndarray, np.ndarray]:
    """All codes of a scheme, and what each is worth before scale and zero point."""
    if scheme.code == "nf4":
        return np.arange(16), np.array(NF4)
    if scheme.code == "fp4_bnb":
        return np.arange(16), np.array([sign * level / 12 for sign in (1, -1) for level in BNB])
    if scheme.code == "fp4_e2m1":
        return np.arange(16), np.array([_small_float(code, 2, 1, 1) / 6 for code in range(16)])
    if scheme.code == "fp8_e4m3":
        codes = np.array([code for code in range(256) if code & 127 != 127])  # all ones is NaN
        return codes, np.array([_small_float(int(code), 4, 3, 7) for code in codes])
    low = -(2 ** (scheme.bits - 1)) if scheme.code == "int" else 0
    codes = np.arange(low, low + 2**scheme.bits)
    if scheme.symmetric and scheme.bits == 1:
        return codes, np.array([-1.0, 1.0])
    return codes, codes.astype(np.float64)


def array(values: Tensor) -> np.ndarray:
    return values.to(torch.float64).numpy()


def group_of(scheme: QuantScheme, columns: int) -> np.ndarray:
    """The group that each column of a row lies in."""
    return np.arange(columns) // (scheme.group or max(1, columns))


def _rows(values: np.ndarray, scheme: QuantScheme) -> np.ndarray:
    return values if scheme.axis == 1 else values.T


def grouped(tensor: QuantizedTensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes, scale and zero point of every element, ``[rows, columns]`` with groups along the columns."""
    codes = _rows(array(tensor.codes), tensor.scheme)
    group = group_of(tensor.scheme, codes.shape[1])
    scale = _rows(array(tensor.dense_scale()), tensor.scheme)[:, group]
    if tensor.zero is None:
        return codes, scale, np.zeros_like(scale)
    return codes, scale, _rows(array(tensor.zero), tensor.scheme)[:, group]


def decoded(tensor: QuantizedTensor) -> np.ndarray:
    """What the tensor stands for, ``[out, in]`` float64."""
    codes, scale, zero = grouped(tensor)
    known, worth = code_values(tensor.scheme)
    position = worth[np.searchsorted(known, codes)]
    return _rows((position - zero) * scale, tensor.scheme)


def nearest_error(values: Tensor, tensor: QuantizedTensor) -> np.ndarray:
    """The least error that any code could give each element on the tensor's own grid, ``[out, in]``."""
    _, scale, zero = grouped(tensor)
    _, worth = code_values(tensor.scheme)
    candidates = (worth - zero[..., None]) * scale[..., None]
    wanted = _rows(array(values), tensor.scheme)[..., None]
    return _rows(np.abs(candidates - wanted).min(-1), tensor.scheme)


def plain_scale(group: np.ndarray, scheme: QuantScheme, symmetric_range: str = "restricted") -> float:
    """The scale of one group, from the definition; before it is cast to the dtype that stores it."""
    low, high = group.min(), group.max()
    largest = max(abs(low), abs(high))
    steps = 2**scheme.bits - 1
    if largest == 0:
        return 0.0
    if low == high and largest >= TINY:
        return float(largest)
    if not scheme.symmetric:
        low, high = (min(low, 0.0), max(high, 0.0)) if scheme.zero == "integer" else _reachable(low, high, scheme)
        scale = (high - low) / steps
    elif scheme.is_codebook:
        scale = largest / 448 if scheme.code == "fp8_e4m3" else largest
    elif scheme.bits == 1:
        scale = np.abs(group).mean()
    elif symmetric_range == "full":
        scale = (largest if -low >= high else -largest) / 2 ** (scheme.bits - 1)
    elif symmetric_range == "centred":
        scale = largest / (steps / 2)
    else:
        scale = largest / (2 ** (scheme.bits - 1) - 1)
    return float(np.sign(scale) * max(abs(scale), TINY))


def _reachable(low: float, high: float, scheme: QuantScheme) -> tuple[float, float]:
    """A range whose float zero point is off by at most a quarter of a code: one far from zero is widened towards it."""
    nearest = max(0.0, 1 - 2 * torch.finfo(scheme.scale_dtype).eps * (2**scheme.bits - 1))
    return (min(low, high * nearest) if low > 0 else low), (max(high, low * nearest) if high < 0 else high)
