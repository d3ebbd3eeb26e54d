"""Packing: identity at every width and length, the exact bits, and refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bitwright.core.bitpack import pack, packed_words, unpack, unpack_padded


def random_codes(bits: int, shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 1 << bits, shape, generator=generator, dtype=torch.uint8)


def bit_string(codes: list[int], bits: int, words: int) -> list[int]:
    """The words of ``codes``, one bit at a time: bit ``b`` of code ``i`` is bit ``i·bits + b`` of the stream."""
    stream = [code >> bit & 1 for code in codes for bit in range(bits)]
    stream += [0] * (words * 32 - len(stream))
    return [sum(stream[32 * word + bit] << bit for bit in range(32)) for word in range(words)]


def unsigned(words: Tensor) -> list[int]:
    return [word & 0xFFFFFFFF for word in words.tolist()]


@pytest.mark.parametrize("bits", range(1, 9))
def test_w10_unpack_of_pack_is_identity_at_every_length(bits: int) -> None:
    """Lengths 1 to 67, with zero bits after the last code."""
    for length in range(1, 68):
        codes = random_codes(bits, (3, length), seed=100 * bits + length)
        codes[0], codes[1, -1] = (1 << bits) - 1, (1 << bits) - 1
        words = pack(codes, bits)
        assert words.dtype == torch.int32 and words.shape == (3, packed_words(length, bits))
        assert torch.equal(unpack(words, bits, length), codes)
        for row, packed in zip(codes.tolist(), words, strict=True):
            assert unsigned(packed) == bit_string(row, bits, words.shape[1])  # the padding is zero in the restatement


@given(st.integers(1, 8), st.lists(st.integers(1, 4), max_size=2), st.integers(1, 300), st.integers(0, 2**32 - 1))
def test_any_leading_shape(bits: int, leading: list[int], length: int, seed: int) -> None:
    codes = random_codes(bits, (*leading, length), seed)
    words = pack(codes, bits)
    assert words.shape == (*leading, packed_words(length, bits)) and words.is_contiguous()
    assert torch.equal(unpack(words, bits, length), codes)
    strided = torch.stack([codes, codes], dim=-1)[..., 0]
    assert torch.equal(pack(strided, bits), words)


@given(st.integers(1, 8), st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_every_word_belongs_to_its_codes(bits: int, length: int, seed: int) -> None:
    """Unpacking arbitrary words and packing again gives the words back, but for the padding."""
    generator = torch.Generator().manual_seed(seed)
    count = packed_words(length, bits)
    words = torch.randint(-(1 << 31), 1 << 31, (count,), generator=generator).to(torch.int32)
    last = length * bits - 32 * (count - 1)
    mask = (1 << last) - 1
    words[-1] = np.array([int(words[-1]) & mask], dtype=np.uint32).view(np.int32).item()
    assert torch.equal(pack(unpack(words, bits, length), bits), words)


def test_w11_word_order() -> None:
    codes = torch.tensor([7, -3, -2, -1, 0, 1, 2, 3])
    assert unsigned(pack((codes + 8).to(torch.uint8), 4)) == [0xBA98765F]
    assert unsigned(pack(torch.full((8,), 7, dtype=torch.uint8), 4)) == [0x77777777]


def test_e24_columns_0_and_8_pack_to_byte_0x80() -> None:
    assert unsigned(pack(torch.tensor([0, 8], dtype=torch.uint8), 4)) == [0x80]


def test_three_bits_straddle_words_at_codes_10_and_21() -> None:
    for code, words in ((10, [1 << 30, 1, 0]), (21, [0, 1 << 31, 1])):
        codes = torch.zeros(32, dtype=torch.uint8)
        codes[code] = 5 if code == 10 else 3  # binary 101 begins at bit 30, binary 011 at bit 63
        assert unsigned(pack(codes, 3)) == words


@given(st.integers(1, 8), st.integers(1, 100), st.integers(0, 2**32 - 1))
def test_padded_words_are_read(bits: int, length: int, seed: int) -> None:
    codes = random_codes(bits, (2, length), seed)
    per_word = 32 // bits
    rows = [
        [sum(code << bits * place for place, code in enumerate(row[start : start + per_word])) for start in starts]
        for row in codes.tolist()
        for starts in [range(0, length, per_word)]
    ]
    words = torch.from_numpy(np.array(rows, dtype=np.uint32).view(np.int32))
    assert torch.equal(unpack_padded(words, bits, length), codes)
    if 32 % bits == 0:
        assert torch.equal(unpack(words, bits, length), codes)


@given(st.integers(1, 7), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_a_code_that_does_not_fit_is_refused(bits: int, length: int, seed: int) -> None:
    codes = random_codes(bits, (length,), seed)
    codes[seed % length] = 1 << bits
    with pytest.raises(ValueError, match=f"does not fit in {bits} bits"):
        pack(codes, bits)


def test_wrong_dtypes_and_word_counts_are_refused() -> None:
    codes = torch.zeros(8, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"must be uint8, not torch\.int8"):
        pack(codes.to(torch.int8), 4)
    for words in (torch.zeros(2, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)):
        with pytest.raises(ValueError, match="8 codes of 4 bits are 1 int32 words"):
            unpack(words, 4, 8)
    with pytest.raises(ValueError, match="20 padded codes of 3 bits are 2 int32 words, not 3"):
        unpack_padded(torch.zeros(3, dtype=torch.int32), 3, 20)


@given(st.integers(1, 8), st.integers(1, 100), st.integers(0, 300), st.integers(0, 2**32 - 1))
def test_an_offset_is_added_to_codes_and_not_to_padding(bits: int, length: int, offset: int, seed: int) -> None:
    codes = random_codes(bits, (2, length), seed)
    moved = ((codes.int() - offset) % 256).to(torch.uint8)
    assert torch.equal(pack(moved, bits, offset=offset), pack(codes, bits))
    if bits < 8:
        with pytest.raises(ValueError, match="does not fit"):
            pack(codes, bits, offset=(1 << bits) - int(codes.max()))


@given(st.integers(1, 8), st.integers(1, 7), st.integers(0, 2**32 - 1))
def test_codes_may_lie_anywhere_in_their_memory(bits: int, start: int, seed: int) -> None:
    codes = random_codes(bits, (start + 64,), seed)
    assert torch.equal(pack(codes[start:], bits), pack(codes[start:].clone(), bits))


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_of_several_tiles(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(bits, (3, 352), seed=bits)
    whole = pack(codes, bits)
    monkeypatch.setattr("bitwright.core.bitpack.TILE", 64)
    assert torch.equal(pack(codes, bits), whole) and torch.equal(unpack(whole, bits, 352), codes)
