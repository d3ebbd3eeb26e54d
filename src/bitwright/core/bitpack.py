"""Codes of 1 to 8 bits as one dense stream of bits in 32-bit words: element i begins at bit i·b, least bit first.

Padding bits are zero. Eight codes, one a byte, are one 64-bit number, whose bits are drawn together in three steps:
pairs of bytes, pairs of pairs, halves. So every width takes the same dozen operations on eight codes at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack", "packed_words", "unpack", "unpack_padded"]

TILE = 1 << 18  # codes worked on at a time, so that the intermediate numbers stay in cache
NARROWER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # whole numbers of as many bytes
LANES = (8, 16, 32)  # widths, in bits, of what the three steps bring together


def packed_words(length: int, bits: int) -> int:
    """How many 32-bit words ``length`` codes of ``bits`` bits take."""
    return -(-length * bits // 32)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack the last dimension: uint8 codes below ``2**bits``, ``[..., n]``, to int32 words ``[..., ceil(n·bits/32)]``.

    Raises:
        ValueError: if the dtype is not uint8 or a code does not fit in ``bits``.
    """
    if codes.dtype != torch.uint8:
        raise ValueError(f"codes must be uint8, not {codes.dtype}")
    if bits < 8 and codes.numel() and int(codes.max()) >= 1 << bits:
        raise ValueError(f"a code of {int(codes.max())} does not fit in {bits} bits")
    length = codes.shape[-1]
    if length % 32:
        codes = torch.nn.functional.pad(codes, (0, 32 - length % 32))
    eights = codes.contiguous().view(-1).view(torch.int64)  # flat first: a dimension of one may have any stride
    stream = torch.empty(eights.numel(), bits, dtype=torch.uint8, device=codes.device)
    for part, target in zip(torch.split(eights, TILE // 8), torch.split(stream, TILE // 8), strict=True):
        packed = _draw_together(part, bits)
        if bits in NARROWER:
            target.view(NARROWER[bits]).squeeze(-1).copy_(packed)  # converting to fewer bytes keeps the low ones
        else:
            target.copy_(packed.view(torch.uint8).view(-1, 8)[:, :bits])
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
