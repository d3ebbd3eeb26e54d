"""The one canonical quantized tensor: every algorithm makes it, every format writes it, every kernel packs it."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.core import grid
from bitwright.core.grid import FitOptions, Parameters
from bitwright.core.scheme import QuantScheme

__all__ = ["QuantizedTensor"]


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizedTensor:
    """A matrix ``[out, in]`` as unpacked codes in the original column order, and the grids of its groups.

    Attributes:
        scheme: what is stored.
        codes: ``[out, in]``, int8 (``int``) or uint8.
        scale: ``[out, groups]`` along axis 1, ``[groups, in]`` along axis 0; or, with double quantization, a
            ``QuantizedTensor`` of shape ``[1, out * groups]``.
        zero: asymmetric schemes only: same shape as the scales; code dtype, or the scale's dtype for float zeros.
        group_index: ``[in]`` int32, the group of each column, where groups are not runs of consecutive columns.

    Raises:
        ValueError: if shapes or dtypes do not agree with the scheme.
    """

    scheme: QuantScheme
    codes: Tensor
    scale: Tensor | QuantizedTensor
    zero: Tensor | None = None
    group_index: Tensor | None = None

    def __post_init__(self) -> None:
        _check_shapes(self)

    @staticmethod
    def quantize(
        values: Tensor, scheme: QuantScheme, options: FitOptions | None = None, *, importance: Tensor | None = None
    ) -> QuantizedTensor:
        """Round ``values`` (``[out, in]``, float) to the nearest codes of grids fitted to them.

        ``importance`` (``[in]``, see :func:`bitwright.core.grid.fit`) weighs the columns in a search for ranges.
        Groups along axis 0 lie within one column, whose importance then changes nothing.

        Raises:
            ArgumentError: BW201 if the importance has another shape, or a number that is negative or not finite.
            BitwrightError: BW602 if a value is not finite.

        Example:
            >>> tensor = QuantizedTensor.quantize(torch.randn(8, 256), QuantScheme(bits=4, group=128))
            >>> tensor.dequantize().shape
            torch.Size([8, 256])
        """
        rows = values if scheme.axis == 1 else values.t().contiguous()
        parameters = grid.fit(rows, scheme=scheme, options=options, importance=importance if scheme.axis == 1 else None)
        return QuantizedTensor.encode(values, scheme, parameters)

    @staticmethod
    def encode(values: Tensor, scheme: QuantScheme, parameters: Parameters) -> QuantizedTensor:
        """Round ``values`` (``[out, in]``) on given grids, whose rows run along ``scheme.axis``.

        With double quantization the scales are rounded first, and the codes are found on the rounded scales.
        """
        rows = values if scheme.axis == 1 else values.t().contiguous()
        stored: Tensor | QuantizedTensor = parameters.scale
        if scheme.scale_scheme is not None:
            flat = parameters.scale.to(torch.float32).reshape(1, -1)
            stored = QuantizedTensor.quantize(flat, scheme.scale_scheme)
            parameters = grid.rescale(parameters, stored.dequantize().view_as(parameters.scale), scheme)
        codes = grid.encode(rows, parameters=parameters, scheme=scheme)
        zero = parameters.zero
        if scheme.axis == 0:
            codes = codes.t().contiguous()
            zero = None if zero is None else zero.t().contiguous()
            stored = stored.t().contiguous() if isinstance(stored, Tensor) else stored
        return QuantizedTensor(scheme=scheme, codes=codes, scale=stored, zero=zero)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.codes.shape[0], self.codes.shape[1])

    @property
    def group_count(self) -> int:
        """How many groups lie along ``scheme.axis``."""
        size = self.codes.shape[self.scheme.axis]
        return 1 if self.scheme.group is None else -(-size // self.scheme.group)

    def dense_scale(self) -> Tensor:
        """The scales as float numbers, ``[out, groups]`` (axis 1) or ``[groups, in]`` (axis 0)."""
        if isinstance(self.scale, Tensor):
            return self.scale
        other = self.codes.shape[1 - self.scheme.axis]
        scale = self.scale.dequantize().view(other, self.group_count)
        return scale if self.scheme.axis == 1 else scale.t().contiguous()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The numbers stored, ``[out, in]``, computed in float32 and returned as ``dtype``."""
        scale, zero = self.dense_scale(), self.zero
        if self.group_index is not None:
            return self._dequantize_indexed(scale, dtype)
        if self.scheme.axis == 1:
            return grid.decode(self.codes, parameters=Parameters(scale, zero), scheme=self.scheme, dtype=dtype)
        parameters = Parameters(scale.t().contiguous(), None if zero is None else zero.t().contiguous())
        rows = self.codes.t().contiguous()
        return grid.decode(rows, parameters=parameters, scheme=self.scheme, dtype=dtype).t().contiguous()

    def rows(self, rows: slice) -> QuantizedTensor:
        """Some output rows as a tensor of their own; only along axis 1 and without double quantization.

        Raises:
            ValueError: along axis 0, or with double quantization, where groups run across rows.
        """
        if self.scheme.axis != 1 or not isinstance(self.scale, Tensor):
            raise ValueError(f"rows of {self.scheme.name} share their scales with other rows")
        zero = None if self.zero is None else self.zero[rows]
        return replace(self, codes=self.codes[rows], scale=self.scale[rows], zero=zero)

    def to(self, device: torch.device) -> QuantizedTensor:
        """The same tensor on another device."""
        zero, index = (None if part is None else part.to(device) for part in (self.zero, self.group_index))
        return replace(self, codes=self.codes.to(device), scale=self.scale.to(device), zero=zero, group_index=index)

    def stored_bits(self) -> int:
        """How many bits the tensor takes when its codes and integer zero points are packed densely."""
        bits = self.codes.numel() * self.scheme.bits
        scale = self.scale
        bits += scale.numel() * scale.element_size() * 8 if isinstance(scale, Tensor) else scale.stored_bits()
        if self.zero is not None:
            width = self.scheme.bits if self.scheme.zero == "integer" else self.zero.element_size() * 8
            bits += self.zero.numel() * width
        return bits + (0 if self.group_index is None else 32 * self.group_index.numel())

    def _dequantize_indexed(self, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """Decode with the columns of each group brought together, one column a group of its own."""
        assert self.group_index is not None
        index = self.group_index.long()
        per_column = Parameters(scale[:, index], None if self.zero is None else self.zero[:, index])
        return grid.decode(self.codes, parameters=per_column, scheme=replace(self.scheme, group=1), dtype=dtype)


def _check_shapes(tensor: QuantizedTensor) -> None:
    scheme, codes = tensor.scheme, tensor.codes
    if codes.dim() != 2 or codes.dtype != scheme.code_dtype:
        found = f"{codes.dtype} {list(codes.shape)}"
        raise ValueError(f"{scheme.name}: codes are a {scheme.code_dtype} matrix, not {found}")
    other = codes.shape[1 - scheme.axis]
    expected = (other, tensor.group_count) if scheme.axis == 1 else (tensor.group_count, other)
    if isinstance(tensor.scale, Tensor):
        if tuple(tensor.scale.shape) != expected:
            raise ValueError(f"{scheme.name}: scales are {list(expected)}, not {list(tensor.scale.shape)}")
    elif tensor.scale.shape != (1, math.prod(expected)) or tensor.scale.scheme != scheme.scale_scheme:
        raise ValueError(f"{scheme.name}: doubly quantized scales are [1, {math.prod(expected)}] in the scale scheme")
    if (tensor.zero is None) != scheme.symmetric:
        raise ValueError(f"{scheme.name}: zero points are {'not ' if scheme.symmetric else ''}part of the scheme")
    if tensor.zero is not None:
        dtypes = (scheme.code_dtype,) if scheme.zero == "integer" else (scheme.scale_dtype, torch.float32)
        if tuple(tensor.zero.shape) != expected or tensor.zero.dtype not in dtypes:
            raise ValueError(f"{scheme.name}: zero points are {list(expected)} of {dtypes[0]}, not {tensor.zero.dtype}")
    if tensor.group_index is not None and (
        scheme.axis != 1 or tensor.group_index.dtype != torch.int32 or tensor.group_index.shape != codes.shape[1:]
    ):
        raise ValueError(f"{scheme.name}: the group index is int32 [{codes.shape[1]}], along axis 1 alone")
