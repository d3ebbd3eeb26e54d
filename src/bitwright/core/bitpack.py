"""Codes of 1 to 8 bits as one dense stream of bits in 32-bit words: element i begins at bit i·b, least bit first.

Padding bits are zero. Eight codes of b bits fill exactly b bytes, so every width is packed by the same few byte
operations on whole columns; nothing loops over elements.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["pack", "packed_words", "unpack", "unpack_padded"]


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
    lanes = codes.reshape(*codes.shape[:-1], -1, 8)
    stream = torch.zeros(*lanes.shape[:-1], bits, dtype=torch.uint8, device=codes.device)
    for lane in range(8):
        byte, shift = divmod(lane * bits, 8)
        stream[..., byte] |= lanes[..., lane] << shift
        if shift + bits > 8:
            stream[..., byte + 1] |= lanes[..., lane] >> (8 - shift)
    words = stream.flatten(-2).view(torch.int32)
    return words[..., : packed_words(length, bits)].contiguous()


def unpack(words: Tensor, bits: int, length: int) -> Tensor:
    """The inverse of :func:`pack`: int32 words ``[..., ceil(length·bits/32)]`` to uint8 codes ``[..., length]``.

    Raises:
        ValueError: if the dtype is not int32 or the number of words is not what ``length`` calls for.
    """
    expected = packed_words(length, bits)
    if words.dtype != torch.int32 or words.shape[-1] != expected:
        found = f"{words.shape[-1]} {words.dtype}"
        raise ValueError(f"{length} codes of {bits} bits are {expected} int32 words, not {found}")
    whole = -(-length // 32) * bits
    if whole != expected:
        words = torch.nn.functional.pad(words, (0, whole - expected))
    stream = words.contiguous().view(torch.uint8).reshape(*words.shape[:-1], -1, bits)
    lanes = torch.empty(*stream.shape[:-1], 8, dtype=torch.uint8, device=words.device)
    for lane in range(8):
        byte, shift = divmod(lane * bits, 8)
        value = stream[..., byte] >> shift
        if shift + bits > 8:
            value = value | (stream[..., byte + 1] << (8 - shift))
        lanes[..., lane] = value & ((1 << bits) - 1)
    return lanes.flatten(-2)[..., :length].contiguous()


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
