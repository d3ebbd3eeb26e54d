"""Attention over keys and values in pages, natively: as computed, or in codes of each token's own.

A row's result is the same in any batch, on any number of threads, in whichever pages, however its prompt was cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError
from bitwright.kernels import native_library

if native_library.missing() is None:
    from bitwright.kernels import _native

__all__ = ["PAGE_SIZES", "Batch", "Pages", "attend", "write_pages"]

PAGE_SIZES = (16, 32, 64, 128)
MOST_DIMENSION = 512
FLOAT_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
INTEGER_CODES = {8: 3, 4: 4}


@dataclass(frozen=True, kw_only=True)
class Pages:
    """Keys and values of one layer.

    Attributes:
        keys, values: ``[pages, heads, page, dimension]`` in float32, float16 or bfloat16, both alike; or codes, uint8
            ``[pages, heads, page, dimension * bits / 8]``, of 4 bits the even number in the low half of a byte.
        key_scale, value_scale: of codes, float32 ``[pages, heads, page, 2]``: a number is ``code * scale + least``.
        dimension: of a head.
        bits: of the codes of keys and of values, 8 or 4 (``(8, 8)``, ``(4, 4)``, ``(8, 4)``); ``None``: floats.
        rotated: whether keys and values are multiplied by a Hadamard matrix before they are stored.

    Raises:
        ArgumentError: BW201 if shapes, dtypes or layouts are not those described.
    """

    keys: Tensor
    values: Tensor
    dimension: int
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    bits: tuple[int, int] | None = None
    rotated: tuple[bool, bool] = (False, False)

    def __post_init__(self) -> None:
        _require_library()
        if self.bits not in (None, (8, 8), (4, 4), (8, 4)):
            raise ArgumentError("BW201", f"bits is {self.bits}", suggestion="None, (8, 8), (4, 4) or (8, 4)")
        if self.keys.dim() != 4 or self.keys.shape[2] not in PAGE_SIZES or not 1 <= self.dimension <= MOST_DIMENSION:
            found = f"keys are {list(self.keys.shape)}, of dimension {self.dimension}"
            wanted = f"[pages, heads, {' or '.join(map(str, PAGE_SIZES))} tokens, numbers], up to {MOST_DIMENSION}"
            raise ArgumentError("BW201", found, suggestion=wanted)
        first = self.keys.shape[:3]
        for name, tensor, bits in zip(("keys", "values"), (self.keys, self.values), self.bits or (0, 0), strict=True):
            width = self.dimension * bits // 8 if bits else self.dimension
            dtypes = [torch.uint8] if bits else [self.keys.dtype] if self.keys.dtype in FLOAT_CODES else []
            _check(name, tensor, dtypes, (*first, width))
        for name, scale in (("key_scale", self.key_scale), ("value_scale", self.value_scale)):
            if self.bits is not None:
                _check(name, scale, [torch.float32], (*first, 2))
        if self.bits is not None and self.dimension * min(self.bits) % 8:
            raise ArgumentError("BW201", f"a head of {self.dimension} numbers", suggestion="an even number, for 4 bits")

    @cached_property
    def record(self) -> _native.Pages:
        """The addresses, as the library takes them; valid for as long as these tensors are."""
        count, heads, page, _ = self.keys.shape
        if self.bits is None:
            codes = (FLOAT_CODES[self.keys.dtype],) * 2
        else:
            codes = (INTEGER_CODES[self.bits[0]], INTEGER_CODES[self.bits[1]])
        key_scale, value_scale = (0 if s is None else s.data_ptr() for s in (self.key_scale, self.value_scale))
        return _native.Pages(
            count, page, heads, self.dimension, *codes, int(self.rotated[0]), int(self.rotated[1]),
            self.keys.data_ptr(), self.values.data_ptr(), key_scale, value_scale,
        )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """New tokens of several sequences; int32 tensors on the CPU.

    Attributes:
        positions: ``[tokens]``, those at the end of each context.
        starts: ``[sequences + 1]``, where each sequence's tokens begin.
        lengths: ``[sequences]``, of the contexts with the new tokens.
        pages: ``[sequences, most pages]``, where each context lies.

    Raises:
        ArgumentError: BW201 if shapes, dtypes or layouts are not those described.
    """

    positions: Tensor
    starts: Tensor
    lengths: Tensor
    pages: Tensor

    def __post_init__(self) -> None:
        shapes: Mapping[str, tuple[int, ...]] = {
            "positions": (self.positions.numel(),),
            "starts": (self.lengths.numel() + 1,),
            "lengths": (self.lengths.numel(),),
            "pages": (self.lengths.numel(), self.pages.shape[-1] if self.pages.dim() == 2 else -1),
        }
        for name, shape in shapes.items():
            _check(name, getattr(self, name), [torch.int32], shape)

    def record(self) -> _native.Batch:
        return _native.Batch(
            self.positions.numel(), self.lengths.numel(), self.pages.shape[1], self.positions.data_ptr(),
            self.starts.data_ptr(), self.lengths.data_ptr(), self.pages.data_ptr(),
        )  # fmt: skip


def write_pages(pages: Pages, batch: Batch, keys: Tensor, values: Tensor) -> None:
    """Put keys and values, float32 ``[tokens, heads, dimension]``, where their positions belong.

    Codes: ``scale = (most - least) / (2^bits - 1)`` of a token's head, rounded half to even.

    Raises:
        ArgumentError: BW201 if shapes, dtypes or layouts are not those described.
        ValueError: if the batch does not fit the pages.
    """
    shape = (batch.positions.numel(), pages.keys.shape[1], pages.dimension)
    _check("keys", keys, [torch.float32], shape)
    _check("values", values, [torch.float32], shape)
    _native.write_pages(pages.record, batch.record(), keys.data_ptr(), values.data_ptr(), torch.get_num_threads())


def attend(pages: Pages, batch: Batch, queries: Tensor, *, scale: float, window: int = 0) -> Tensor:
    """``softmax(scale * queries @ keys.T) @ values``, float32 as ``queries [tokens, query heads, dimension]``.

    A token sees the positions up to its own, of those the last ``window`` (0: all). Query head ``h`` reads head
    ``h // (query heads / heads)``. The weighted sum is taken over chunks of 128 tokens with a running largest score
    (Milakov, Gimelshein 2018, algorithm 3).

    Raises:
        ArgumentError: BW201 if shapes, dtypes or layouts are not those described.
        ValueError: if the batch does not fit the pages.
    """
    heads = queries.shape[1] if queries.dim() == 3 else 0
    _check("queries", queries, [torch.float32], (batch.positions.numel(), heads, pages.dimension))
    output = torch.empty_like(queries)
    _native.attend(
        pages.record, batch.record(), queries.data_ptr(), heads, scale, window, output.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return output


def _require_library() -> None:
    missing = native_library.missing()
    if missing is not None:
        raise ArgumentError("BW201", missing, suggestion=native_library.BUILD)
    native_library.instruction_set()


def _check(name: str, tensor: Tensor | None, dtypes: list[torch.dtype], shape: tuple[int, ...]) -> None:
    is_sound = tensor is not None and tensor.dtype in dtypes and tensor.shape == shape
    if tensor is not None and is_sound and tensor.is_contiguous() and tensor.device.type == "cpu":
        return
    found = "missing" if tensor is None else f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
    wanted = f"contiguous {' or '.join(map(str, dtypes)) or 'float32, float16 or bfloat16'} {list(shape)} on the CPU"
    raise ArgumentError("BW201", f"{name}: {found}", suggestion=wanted)
