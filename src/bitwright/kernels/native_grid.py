"""The loops of ``core/grid.py`` over all numbers, natively: ranges of groups, codes, and numbers again, bit for bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitwright.core.grid import Loops
from bitwright.core.memory import use_huge_pages
from bitwright.core.scheme import QuantScheme
from bitwright.kernels import native_library
from bitwright.kernels.native import DTYPES
from bitwright.kernels.native_library import address

if native_library.missing() is None:
    from bitwright.kernels import _native

__all__ = ["LOOPS", "accepts", "decode", "encode", "find_ranges", "rounded", "step_offsets"]

PLAIN = (Tensor, nn.Parameter)  # no tensors that only look like one


def accepts(numbers: Tensor, scheme: QuantScheme, dtype: torch.dtype) -> bool:
    """Whether numbers (or codes) ``[rows, columns]`` of ``scheme`` can be gone over here, as numbers of ``dtype``."""
    is_plain = type(numbers) in PLAIN and numbers.device.type == "cpu" and numbers.is_contiguous()
    is_counted = not scheme.is_codebook and not (scheme.symmetric and scheme.bits == 1)
    is_free = not (numbers.requires_grad and torch.is_grad_enabled()) and not torch.compiler.is_compiling()
    is_known = dtype in DTYPES and native_library.missing() is None
    return is_known and is_plain and is_counted and is_free and numbers.numel() > 0


def find_ranges(values: Tensor, group: int) -> tuple[Tensor, Tensor] | None:
    """Least and greatest number of each group, float32 ``[rows, groups]``; ``None`` if some are not finite."""
    native_library.instruction_set()
    rows, columns = values.shape
    shape = (rows, -(-columns // group))
    low, high = (torch.empty(shape, dtype=torch.float32, device="cpu") for _ in range(2))
    is_finite = _native.find_ranges(
        values.data_ptr(), DTYPES[values.dtype], rows, columns, group, low.data_ptr(), high.data_ptr(), _threads()
    )
    return (low, high) if is_finite else None


def encode(
    values: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group: int,
    scheme: QuantScheme,
    offset: Tensor | None = None,
    into: Tensor | None = None,
) -> Tensor:
    """Codes of ``values``, for ``scale`` and ``zero`` of any dtype, ``[rows, groups]``.

    ``offset`` (float32, of the shape of ``values``, in codes) is added before they are rounded. ``into``: earlier codes
    that are written over.
    """
    native_library.instruction_set()
    codes = _matching(into, values, scheme.code_dtype)
    if codes is None:
        codes = use_huge_pages(torch.empty(values.shape, dtype=scheme.code_dtype, device="cpu"))
    scale, zero = _parts(scale, zero, values, group)
    rows, columns = values.shape
    _native.encode(
        values.data_ptr(), DTYPES[values.dtype], rows, columns, group, scale.data_ptr(), address(zero),
        address(_matching(offset, values, torch.float32)), scheme.zero != "float", scheme.code_min, scheme.code_max,
        codes.data_ptr(), 0, _threads(),
    )  # fmt: skip
    return codes


def decode(
    codes: Tensor, scale: Tensor, zero: Tensor | None, group: int, scheme: QuantScheme, dtype: torch.dtype
) -> Tensor:
    """What ``codes`` stand for."""
    native_library.instruction_set()
    values = use_huge_pages(torch.empty(codes.shape, dtype=dtype, device="cpu"))
    scale, zero = _parts(scale, zero, codes, group)
    rows, columns = codes.shape
    _native.decode(
        codes.data_ptr(), rows, columns, group, scale.data_ptr(), address(zero), scheme.code_min, DTYPES[dtype],
        values.data_ptr(), _threads(),
    )  # fmt: skip
    return values


def rounded(
    values: Tensor, scale: Tensor, zero: Tensor | None, group: int, scheme: QuantScheme, offset: Tensor, into: Tensor
) -> Tensor:
    """What the codes of :func:`encode` stand for, without writing them down: ``into``, which is like ``values``."""
    native_library.instruction_set()
    scale, zero = _parts(scale, zero, values, group)
    rows, columns = values.shape
    _native.encode(
        values.data_ptr(), DTYPES[values.dtype], rows, columns, group, scale.data_ptr(), address(zero),
        address(_matching(offset, values, torch.float32)), scheme.zero != "float", scheme.code_min, scheme.code_max,
        0, address(_matching(into, values, values.dtype)), _threads(),
    )  # fmt: skip
    return into


def step_offsets(
    values: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    group: int,
    scheme: QuantScheme,
    offset: Tensor,
    grad: Tensor,
    step: float,
) -> tuple[Tensor, Tensor]:
    """Move ``offset`` by ``step`` against the sign of its gradient, within [-0.5, 0.5].

    ``grad``, of the shape and the dtype of ``values``, is the gradient of the rounded numbers: rounding passes it on, a
    clamped code does not. Returned are the gradients of scales and whole zero points, before the step, float32.
    """
    native_library.instruction_set()
    scale, zero = _parts(scale, zero, values, group)
    by_scale, by_zero = torch.empty_like(scale), torch.empty_like(scale)
    rows, columns = values.shape
    _native.step_offsets(
        values.data_ptr(), DTYPES[values.dtype], rows, columns, group, scale.data_ptr(), address(zero),
        address(_matching(offset, values, torch.float32)), scheme.code_min, scheme.code_max,
        address(_matching(grad, values, values.dtype)), step, by_scale.data_ptr(), by_zero.data_ptr(), _threads(),
    )  # fmt: skip
    return by_scale, by_zero


LOOPS = Loops(accepts, find_ranges, encode, decode)


def _parts(scale: Tensor, zero: Tensor | None, numbers: Tensor, group: int) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points as they are read."""
    shape = (numbers.shape[0], -(-numbers.shape[1] // group))
    if scale.shape != shape or (zero is not None and zero.shape != shape):
        raise ValueError(f"scales and zero points of {list(numbers.shape)} numbers are {list(shape)}")
    scale = scale.detach().to(torch.float32).contiguous()
    return scale, None if zero is None else zero.detach().to(torch.float32).contiguous()


def _matching(given: Tensor | None, values: Tensor, dtype: torch.dtype) -> Tensor | None:
    """``given``, if it is of ``dtype`` and lies as ``values`` do."""
    if given is None:
        return None
    if given.shape != values.shape or not given.is_contiguous() or given.device.type != "cpu":
        raise ValueError(f"{list(given.shape)} beside numbers of shape {list(values.shape)}, or not in order")
    if given.dtype != dtype:
        raise ValueError(f"numbers are {dtype} here, not {given.dtype}")
    return given


def _threads() -> int:
    return torch.get_num_threads()
