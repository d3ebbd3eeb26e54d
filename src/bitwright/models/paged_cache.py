"""Keys and values of many sequences in pages of 32 tokens: one object for all layers, which knows no sequence.

Which page belongs to whom is the engine's business; here lie the numbers, and how they are written and read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError
from bitwright.core.kv_codes import Coded, decode_kv, encode_kv, refuse_head
from bitwright.core.kv_scheme import KVCode, KVScheme, code_bytes
from bitwright.core.memory import map_memory

__all__ = ["PAGE", "CacheShape", "PagedCache", "refuse_scheme"]

PAGE = 32  # tokens of a page
MAPPED = 1 << 20  # bytes from which memory is mapped by itself


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """What a page holds of each token: ``layers`` times keys and values of ``kv_heads`` heads of ``head_dim``.

    ``dtype`` is that of numbers which are kept as computed.
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype


def refuse_scheme(scheme: KVScheme, head_dim: int) -> str | None:
    """Why a paged cache cannot store keys and values so, or ``None``: a page holds whole tokens, each by itself."""
    for each in (scheme, *scheme.overrides.values()):
        if each.window or each.sinks:
            return "tokens that stay in floating point for a while have no place in its pages"
        for code in (each.key, each.value):
            if not code.is_float and code.grain != "token_head":
                return f"{code.name} codes are not those of one token by itself"
            reason = None if code.is_float else refuse_head(code, head_dim)
            if reason is not None:
                return reason
    return None


class PagedCache:
    """The storage of ``page_count`` pages.

    Attributes:
        page: tokens of a page.
        keys, values: for each layer, as computed, ``[page_count, kv_heads, page, head_dim]`` of the shape's dtype.
        key_codes, value_codes: for each layer, uint8 ``[page_count, kv_heads, page, bytes]``: with 4 bits the even
            channel is in the low half of a byte.
        key_scale, value_scale: for each layer, float32 ``[page_count, kv_heads, page, n]``: the scales of a token's
            groups of channels, then their offsets unless the codes are symmetric. Without groups: scale, offset.

        Where a layer has the one, its entry of the other has no elements.

    Raises:
        ArgumentError: BW201 if :func:`refuse_scheme` says why the scheme cannot be stored.
    """

    page: int = PAGE

    def __init__(
        self, shape: CacheShape, page_count: int, scheme: KVScheme | None = None, device: torch.device | None = None
    ) -> None:
        self.shape, self.page_count, self.scheme = shape, page_count, scheme or KVScheme()
        reason = refuse_scheme(self.scheme, shape.head_dim)
        if reason is not None:
            what = f"a paged cache cannot store {self.scheme.name}: {reason}"
            raise ArgumentError("BW201", what, suggestion="kv_cache: none, int8, int4, int4-rotated, k8v4 or fp8")
        self._device = device
        codes = [(self.scheme.at(layer).key, self.scheme.at(layer).value) for layer in range(shape.layers)]
        self.keys, self.key_codes, self.key_scale = self._room([key for key, _ in codes])
        self.values, self.value_codes, self.value_scale = self._room([value for _, value in codes])

    def _room(self, codes: list[KVCode]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Numbers, codes and scales of each layer, of keys or of values.

        All zero: what lies behind the end of a sequence is multiplied by zero, and must be finite for that.
        """
        shape, numbers, packed, scales = self.shape, [], [], []
        for code in codes:
            groups = shape.head_dim // code.group if code.group else 1
            width = -(-shape.head_dim * code.bits // 8)
            numbers.append(self._zeros(shape.head_dim if code.is_float else 0, shape.dtype))
            packed.append(self._zeros(0 if code.is_float else width, torch.uint8))
            scales.append(self._zeros(0 if code.is_float else groups * (2 - code.symmetric), torch.float32))
        return numbers, packed, scales

    def _zeros(self, width: int, dtype: torch.dtype) -> Tensor:
        size = (self.page_count if width else 0, self.shape.kv_heads, PAGE, width)
        if self._device is None or self._device.type == "cpu":
            return _untouched_zeros(size, dtype)
        return torch.zeros(size, dtype=dtype, device=self._device)

    def is_rotated(self, layer: int) -> bool:
        """Whether a product is part of coding, whose sums may depend on how many rows it has."""
        own = self.scheme.at(layer)
        return own.key.rotated or own.value.rotated

    def encode(self, layer: int, keys: Tensor, values: Tensor) -> list[Tensor]:
        """What is stored of tokens, one a row (``[n, kv_heads, head_dim]``): tensors ``[n, kv_heads, ...]``."""
        own = self.scheme.at(layer)
        parts: list[Tensor] = []
        for code, rows in ((own.key, keys), (own.value, values)):
            if code.is_float:
                parts.append(rows.to(self.shape.dtype))
                continue
            coded = encode_kv(rows.transpose(0, 1)[None], code)
            assert coded.scale is not None
            scale = coded.scale if coded.low is None else torch.cat([coded.scale, coded.low], dim=-1)
            parts += [coded.codes[0].transpose(0, 1), scale[0].transpose(0, 1)]
        return parts

    def write(self, layer: int, pages: Tensor, offsets: Tensor, parts: list[Tensor]) -> None:
        """Put what :meth:`encode` gave at ``offsets [n]`` in ``pages [n]`` (int64)."""
        for place, part in zip(self._places(layer), parts, strict=True):
            place[pages, :, offsets] = part

    def _places(self, layer: int) -> list[Tensor]:
        own = self.scheme.at(layer)
        keys = [self.keys] if own.key.is_float else [self.key_codes, self.key_scale]
        values = [self.values] if own.value.is_float else [self.value_codes, self.value_scale]
        return [tensors[layer] for tensors in (*keys, *values)]

    def read(self, layer: int, pages: list[int]) -> tuple[Tensor, Tensor]:
        """Keys and values of pages, float32 ``[pages, kv_heads, page, head_dim]``, each page as if read alone."""
        own = self.scheme.at(layer)
        keys = self._decode(own.key, self.keys, self.key_codes, self.key_scale, layer, pages)
        return keys, self._decode(own.value, self.values, self.value_codes, self.value_scale, layer, pages)

    def _decode(
        self,
        code: KVCode,
        numbers: list[Tensor],
        codes: list[Tensor],
        scales: list[Tensor],
        layer: int,
        pages: list[int],
    ) -> Tensor:
        if code.is_float:
            return numbers[layer][pages].to(torch.float32)
        if code.rotated and len(pages) > 1:  # a product's sums may depend on how many rows it has
            return torch.cat([self._decode(code, numbers, codes, scales, layer, [page]) for page in pages])
        scale = scales[layer][pages]
        scale, low = (scale, None) if code.symmetric else scale.chunk(2, dim=-1)
        return decode_kv(Coded(codes[layer][pages], scale, low), code, self.shape.head_dim)

    def clear(self, pages: list[int]) -> None:
        """Set pages to zero, as after a step that made numbers that are not finite."""
        for layer in range(self.shape.layers):
            for place in self._places(layer):
                place[pages] = 0

    def page_bytes(self, tokens: int = PAGE) -> int:
        """How many bytes keys and values of so many tokens take, in all layers."""
        codes = [code for layer in range(self.shape.layers) for code in self._codes(layer)]
        return sum(
            code_bytes(
                code,
                tokens=tokens,
                heads=self.shape.kv_heads,
                head_dim=self.shape.head_dim,
                float_bytes=self.shape.dtype.itemsize,
            )
            for code in codes
        )

    def _codes(self, layer: int) -> tuple[KVCode, KVCode]:
        own = self.scheme.at(layer)
        return own.key, own.value

    def bytes(self) -> int:
        """How much memory all pages take."""
        every = [self.keys, self.values, self.key_codes, self.value_codes, self.key_scale, self.value_scale]
        return sum(tensor.nbytes for tensors in every for tensor in tensors)


def _untouched_zeros(size: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros on the CPU that take memory where they are written to: a cache has room for what may come, most of which
    does not. torch would write every zero, and so does what takes memory from a heap that was used before."""
    count = math.prod(size) * dtype.itemsize
    if count < MAPPED:
        return torch.zeros(size, dtype=dtype)
    try:
        room = map_memory(count)
    except OSError as error:
        raise MemoryError(f"{count} bytes for a cache cannot be had: {error}") from error
    return torch.frombuffer(room, dtype=torch.uint8).view(dtype).view(size)
