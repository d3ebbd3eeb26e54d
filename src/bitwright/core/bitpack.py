"""Codes of 1 to 8 bits as one dense stream of bits in 32-bit words: element i begins at bit i·b, least bit first.

Padding bits are zero. Eight codes, one a byte, are one 64-bit number, whose bits are drawn together in three steps:
pairs of bytes, pairs of pairs, halves. So every width takes the same dozen operations on eight codes at once. Widths
that divide 8 are packed in fewer, a pair of bytes to one byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.core.memory import use_huge_pages

__all__ = ["pack", "packed_words", "unpack", "unpack_padded"]

TILE = 1 << 18  # codes worked on at a time, so that the intermediate numbers stay in cache
LANES = (8, 16, 32)  # widths, in bits, of what the three steps bring together


def packed_words(length: int, bits: int) -> int:
    """How many 32-bit words ``length`` codes of ``bits`` bits take."""
    return -(-length * bits // 32)


def pack(codes: Tensor, bits: int, *, offset: int = 0) -> Tensor:
    """Pack the last dimension: uint8 codes below ``2**bits``, ``[..., n]``, to int32 words ``[..., ceil(n·bits/32)]``.

    ``offset`` is added to each code first, modulo 256: signed codes, seen as uint8, are packed with ``2**(bits-1)``.

    Raises:
        ValueError: if the dtype is not uint8 or a code does not fit in ``bits``.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, not {codes.dtype}")
    length = codes.shape[-1]
    if length % 32:
        codes, offset = torch.nn.functional.pad(codes + offset, (0, 32 - length % 32)), 0  # nothing is added to padding
    flat = codes.contiguous().view(-1)  # flat first: a dimension of one may have any stride
    flat = flat if flat.storage_offset() % 8 == 0 else flat.clone()  # only aligned bytes are seen as wider numbers
    stream = use_huge_pages(torch.empty(flat.numel() // 8 * bits, dtype=torch.uint8, device=codes.device))
    for part, target in zip(torch.split(flat, TILE), torch.split(stream, TILE // 8 * bits), strict=True):
        tile = part + offset if offset else part
        if bits < 8 and tile.numel() and int(tile.max()) >= 1 << bits:
            raise ValueError(f"a code of {int(tile.max())} does not fit in {bits} bits")
        _pack_tile(tile, bits, target)
    words = stream.view(*codes.shape[:-1], -1).view(torch.int32)
    return words[..., : packed_words(length, bits)].contiguous()


def unpack(words: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of :func:`pack`: int32 words ``[..., ceil(length·bits/32)]`` to uint8 codes ``[..., length]``.

    Raises:
        ValueError: if the dtype is not int32 or the number of words is not what ``length`` calls for.
    """
    expected = packed_words(length, bits)
    if words.dtype != torch.int32 or words.shape[-1] != expected:
        raise ValueError(
            f"{length} codes of {bits} bits are {expected} int32 words, not {words.shape[-1]} {words.dtype}"
        )
    whole = -(-length // 32) * bits
    if whole != expected:
        words = torch.nn.functional.pad(words, (0, whole - expected))
    stream = words.contiguous().view(-1).view(torch.uint8).view(-1, bits)
    codes = torch.empty(stream.shape[0], 8, dtype=torch.uint8, device=words.device)
    for part, target in zip(torch.split(stream, TILE // 8), torch.split(codes, TILE // 8), strict=True):
        eights = torch.zeros(part.shape[0], 8, dtype=torch.uint8, device=words.device)
        eights[:, :bits] = part
        target.copy_(_spread_apart(eights.view(torch.int64).flatten(), bits).view(torch.uint8).view(-1, 8))
    return codes.view(*words.shape[:-1], -1)[..., :length].contiguous()


def unpack_padded(words: Tensor, bits: int, length: int) -> Tensor:
    """Read the other packing of odd widths: ``32 // bits`` whole codes a word, the rest of each word empty.

    Raises:
        ValueError: if the number of words is not what ``length`` calls for.
    """
    per_word = 32 // bits
    expected = -(-length // per_word)
    if words.dtype != torch.int32 or words.shape[-1] != expected:
        raise ValueError(f"{length} padded codes of {bits} bits are {expected} int32 words, not {words.shape[-1]}")
    shifts = torch.arange(per_word, device=words.device) * bits
    codes = (words.unsqueeze(-1).to(torch.int64) >> shifts) & ((1 << bits) - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :length].contiguous()


def _pack_tile(codes: Tensor, bits: int, target: Tensor) -> None:
    """Pack codes (flat, a multiple of 32) into the bytes of ``target``."""
    if bits in (3, 5, 6, 7):
        packed = _draw_together(codes.view(torch.int64), bits)
        target.view(-1, bits).copy_(packed.view(torch.uint8).view(-1, 8)[:, :bits])
        return
    while bits < 8:  # two codes to one of twice the width, as often as that fits in a byte
        pairs = codes.view(torch.int16)
        codes, bits = pairs | (pairs >> (8 - bits)), 2 * bits
        codes = codes if bits == 8 else codes.to(torch.uint8)
    target.copy_(codes)  # converting to fewer bytes keeps the low ones


def _draw_together(eights: Tensor, bits: int) -> Tensor:
    """Bring the ``bits`` low bits of each of eight bytes (int64) to the low end of the number."""
    for lane in LANES if bits < 8 else ():
        filled = bits * lane // 8
        low = _low_bits(filled, 2 * lane)
        eights = (eights & low) | ((eights >> (lane - filled)) & (low << filled))
    return eights


def _spread_apart(eights: Tensor, bits: int) -> Tensor:
    """The inverse of :func:`_draw_together`."""
    for lane in reversed(LANES) if bits < 8 else ():
        filled = bits * lane // 8
        low = _low_bits(filled, 2 * lane)
        eights = (eights & low) | ((eights & (low << filled)) << (lane - filled))
    return eights


def _low_bits(count: int, period: int) -> int:
    """A 64-bit mask of ``count`` ones at the low end of every ``period`` bits."""
    return sum(((1 << count) - 1) << start for start in range(0, 64, period))
