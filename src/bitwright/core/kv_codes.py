"""The codes of keys and values, ``[batch, heads, tokens, head_dim]``: what the grid makes of them, packed.

An offset is taken off first, so that the grid begins at its code 0: of online codes the least number of the group
(``value = code * scale + low``), of calibrated ones the middle of the range (``value = code * scale + zero_point``).
Rotated codes of 4 bits or less, and 8-bit codes of heads of at most 8 numbers, take the best of several grids (see
:mod:`.kv_search`).

Small heads, of up to 32 numbers, often have one that is far larger than the others, which a rotation spreads over all
of them as a pattern of signs: row ``m`` of the Hadamard matrix, where ``m`` is its place. The offset of rotated codes
that are searched takes the signs of this row in such heads, ``value = sign_m * (code * scale + low)``, and so holds the
large number, instead of the first one. ``m`` is in the last five bits of the scale, which is off by 4e-6 of itself at
most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.core.bitpack import pack, unpack
from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.grid import Parameters, decode, encode, fit
from bitwright.core.kv_scheme import KVCode
from bitwright.core.kv_search import most_numbers, search_grids
from bitwright.core.scheme import QuantScheme

__all__ = [
    "Coded", "StaticParameters", "decode_kv", "encode_kv", "hadamard_block", "has_patterns", "is_searched", "join",
    "refuse_head", "rotate_head", "unpacked",
]  # fmt: skip

PATTERNS = 32  # the most that a head has, and the least numbers of which a scale has bits for them


@dataclass(frozen=True, slots=True)
class StaticParameters:
    """Calibrated ``scale`` and ``zero_point`` (0 if symmetric) of keys or values: float32, ``[1]`` or ``[heads]``."""

    scale: Tensor
    zero_point: Tensor


@dataclass(frozen=True, slots=True)
class Coded:
    """Coded tokens.

    Attributes:
        codes: uint8 ``[batch, heads, tokens, bytes]``, channels from the low bits of a byte up; of float codes the
            numbers themselves, ``[batch, heads, tokens, head_dim]``.
        scale: float32 ``[batch, heads, tokens, groups]``, of per-channel codes ``[batch, heads, groups, head_dim]``;
            ``None`` for float and calibrated codes, whose parameters are not those of a token.
        low: the offsets, as ``scale``; ``None`` for symmetric codes.
    """

    codes: Tensor
    scale: Tensor | None = None
    low: Tensor | None = None

    @property
    def tokens(self) -> int:
        return self.codes.shape[2]

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.codes, self.scale, self.low) if part is not None)

    def each(self, change: Callable[[Tensor], Tensor]) -> Coded:
        """The same tokens with ``change`` made to every part, along a dimension that all have."""
        scale, low = (None if part is None else change(part) for part in (self.scale, self.low))
        return Coded(change(self.codes), scale, low)

    def span(self, start: int, end: int, group: int = 1) -> Coded:
        """The tokens from ``start`` up to ``end``, whole groups of ``group``; copied, so that the others can go."""
        scale, low = (
            None if part is None else part[:, :, start // group : end // group].clone()
            for part in (self.scale, self.low)
        )
        return Coded(self.codes[:, :, start:end].clone(), scale, low)


def join(parts: list[Coded]) -> Coded:
    """Several runs of tokens as one."""
    if len(parts) == 1:
        return parts[0]
    scales = [part.scale for part in parts if part.scale is not None]
    lows = [part.low for part in parts if part.low is not None]
    codes = torch.cat([part.codes for part in parts], dim=2)
    return Coded(codes, torch.cat(scales, dim=2) if scales else None, torch.cat(lows, dim=2) if lows else None)


def encode_kv(x: Tensor, code: KVCode, parameters: StaticParameters | None = None, *, search: bool = True) -> Coded:
    """Code keys or values ``x`` (``[batch, heads, tokens, head_dim]``, any float dtype).

    Per-channel codes take whole groups of tokens; calibrated ones need ``parameters``. Without ``search`` every grid is
    the plain one, from the least number to the greatest.

    Raises:
        BitwrightError: BW602 if a number is not finite.

    Example:
        >>> coded = encode_kv(torch.full((1, 1, 2, 4), 2.5), KVCode(bits=4))
        >>> coded.codes.shape, float(decode_kv(coded, KVCode(bits=4), 4).max())
        (torch.Size([1, 1, 2, 2]), 2.5)
    """
    if code.is_float:
        return Coded(x.clone())  # the caller may write to what it gave
    numbers = rotate_head(x.to(torch.float32)) if code.rotated else x.to(torch.float32)
    if code.is_static:
        return Coded(_packed(_encode_static(numbers, code, _given(parameters)), code))
    patterns = _patterns_of(x) if has_patterns(code, x.shape[-1]) else None
    groups = _to_groups(numbers if patterns is None else numbers * _signs(patterns, x.shape[-1]), code)
    scheme = _scheme(code)
    low = None if code.symmetric else groups.amin(-1, keepdim=True)
    shifted = groups if low is None else groups - low
    wide: Tensor | None = None
    if low is not None and not bool(torch.isfinite(shifted).all()):
        wide = ~torch.isfinite(shifted).all(-1, keepdim=True)  # the range of huge numbers overflows, that of halves not
        shifted = torch.where(wide, groups / 2 - low / 2, shifted)
    rows = shifted.flatten(0, -2)
    scale = fit(rows, scheme=scheme).scale
    codes = encode(rows, parameters=_on_zero(scale, scheme), scheme=scheme)
    if low is not None and search and is_searched(code, rows.shape[1]):
        codes, scale, low = _searched(groups, codes, scale, low, code)
    if wide is not None:
        scale = torch.where(wide.view(-1, 1), scale * 2, scale)
    scale = scale.view(groups.shape[:-1])
    if patterns is not None:
        scale = ((scale.view(torch.int32) & -PATTERNS) | patterns[..., None]).view(torch.float32)
    packed = _packed(_from_groups(codes.view(groups.shape), code), code)
    return Coded(codes=packed, scale=scale, low=None if low is None else low.squeeze(-1))


def decode_kv(
    coded: Coded,
    code: KVCode,
    head_dim: int,
    parameters: StaticParameters | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    keep_rotated: bool = False,
) -> Tensor:
    """The numbers (``dtype``, computed in float32) of coded tokens: ``[batch, heads, tokens, head_dim]``.

    With ``keep_rotated`` those of rotated codes stay rotated, for queries that are too.
    """
    if code.is_float:
        return coded.codes.to(dtype)
    codes = unpacked(coded.codes, code, head_dim)
    if code.is_static:
        scale, zero_point = (_per_head(each) for each in _parts(_given(parameters)))
        positions = codes.view(torch.float8_e4m3fn) if code.kind == "fp8" else codes.view(torch.int8)
        return (positions.to(torch.float32) * scale + zero_point).to(dtype)
    assert coded.scale is not None
    groups = _to_groups(codes, code)
    scheme = _scheme(code)
    rows = groups.flatten(0, -2)
    rows = rows.view(torch.int8) if scheme.code == "int" else rows
    scale = coded.scale.reshape(-1, 1)
    numbers = decode(rows, parameters=Parameters(scale, None), scheme=scheme).view(groups.shape)
    if coded.low is not None:
        numbers += coded.low.unsqueeze(-1)
    numbers = _from_groups(numbers, code)
    if has_patterns(code, head_dim):
        numbers = numbers * _signs(coded.scale[..., 0].view(torch.int32) & (PATTERNS - 1), head_dim)
    return (rotate_head(numbers) if code.rotated and not keep_rotated else numbers).to(dtype)


def rotate_head(x: Tensor) -> Tensor:
    """``x`` (float32, ``[..., head_dim]``) times the orthonormal Hadamard matrix, which undoes itself.

    Heads whose size is no power of two are rotated in blocks of the largest one that divides it. Sums and differences
    of pairs, half after half, as the native kernels take them: a product's sums would depend on how many rows it has.
    """
    block, half, turned = hadamard_block(x.shape[-1]), 1, x
    while half < block:
        pairs = turned.reshape(*x.shape[:-1], -1, 2, half)
        low, high = pairs.unbind(-2)
        turned = torch.stack((low + high, low - high), dim=-2)
        half *= 2
    return turned.reshape(x.shape) * float(1 / torch.tensor(float(block)).sqrt())


def hadamard_block(head_dim: int) -> int:
    """How many channels are rotated together: the largest power of two that divides ``head_dim``."""
    return head_dim & -head_dim


def is_searched(code: KVCode, numbers: int) -> bool:
    """Whether the codes of ``numbers`` that share a scale are the best of several grids."""
    has_offset = code.kind == "int" and not code.symmetric and not code.is_static
    # Of 8 bits whole heads only: of large heads there are so many groups that a token of 7B would take half a second.
    is_meant = code.grain == "token_head" and not code.group if code.bits == 8 else code.rotated
    return has_offset and is_meant and numbers <= most_numbers(code.code_max)


def has_patterns(code: KVCode, head_dim: int) -> bool:
    """Whether the offset of these codes has the signs of a row of the Hadamard matrix."""
    is_small = head_dim <= PATTERNS and hadamard_block(head_dim) == head_dim
    is_whole = code.rotated and code.grain == "token_head" and code.group == 0
    return is_small and is_whole and is_searched(code, head_dim)


def refuse_head(code: KVCode, head_dim: int) -> str | None:
    """Why heads of this size cannot be stored so, or ``None``."""
    if code.grain == "token_head" and code.group and head_dim % min(code.group, head_dim):
        return f"groups of {code.group} channels do not divide a head of {head_dim}"
    if code.rotated and hadamard_block(head_dim) == 1:
        return f"a head of {head_dim} channels, an odd number, has no Hadamard matrix to be rotated with"
    return None


def unpacked(codes: Tensor, code: KVCode, head_dim: int) -> Tensor:
    """Codes one a byte, uint8 ``[..., head_dim]``; signed ones keep their bits (see them as int8)."""
    if code.bits == 8:
        return codes
    words = -(-head_dim * code.bits // 32)
    padded = torch.nn.functional.pad(codes, (0, 4 * words - codes.shape[-1])).contiguous()
    spread = unpack(padded.view(torch.int32), code.bits, head_dim)
    return spread - (1 << (code.bits - 1)) if code.symmetric else spread  # modulo 256, as two's complement is


def _packed(codes: Tensor, code: KVCode) -> Tensor:
    """The inverse of :func:`unpacked`."""
    plain = codes.contiguous().view(torch.uint8)
    if code.bits == 8:
        return plain
    words = pack(plain, code.bits, offset=1 << (code.bits - 1) if code.symmetric else 0)
    return words.view(torch.uint8)[..., : -(-codes.shape[-1] * code.bits // 8)].contiguous()


def _scheme(code: KVCode) -> QuantScheme:
    """The grid of one group, a row; asymmetric ones begin at zero, since their offset is taken off before."""
    if code.kind == "fp8":
        return QuantScheme(code="fp8_e4m3", bits=8, group=None, scale_dtype=torch.float32)
    if code.symmetric:
        return QuantScheme(code="int", bits=code.bits, group=None, scale_dtype=torch.float32)
    return QuantScheme(code="uint", bits=code.bits, group=None, symmetric=False, scale_dtype=torch.float32)


def _on_zero(scale: Tensor, scheme: QuantScheme) -> Parameters:
    return Parameters(scale, None if scheme.symmetric else torch.zeros_like(scale))


def _searched(groups: Tensor, codes: Tensor, scale: Tensor, low: Tensor, code: KVCode) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scale and offset of the best grids where there is a search, else as given."""
    found, best_scale, best_low, searched = search_grids(groups.flatten(0, -2), code.code_max)
    taken = searched[:, None]
    low = torch.where(taken, best_low[:, None], low.reshape(-1, 1)).view(low.shape)
    return torch.where(taken, found, codes), torch.where(taken, best_scale[:, None], scale), low


def _patterns_of(x: Tensor) -> Tensor:
    """The place of each head's largest number, the first of equal ones: int32 ``[batch, heads, tokens]``."""
    sizes, width = x.to(torch.float32).abs(), x.shape[-1]
    places = torch.arange(width, dtype=torch.int32, device=x.device)
    return torch.where(sizes == sizes.amax(-1, keepdim=True), places, width - 1).amin(-1)


def _signs(patterns: Tensor, width: int) -> Tensor:
    """Rows of the Hadamard matrix of ones and minus ones: float32 ``[..., width]`` for ``patterns [...]``."""
    matrix = rotate_head(torch.eye(width, device=patterns.device)).sign()
    return matrix[patterns.long() & (width - 1)]


def _encode_static(numbers: Tensor, code: KVCode, parameters: StaticParameters) -> Tensor:
    """round((f - zero_point) / scale), clamped to [-128, 127]: the extremes fall on ±127.5."""
    if not bool(torch.isfinite(numbers).all()):
        what = "NaN or infinity among the keys or values to quantize"
        raise BitwrightError(
            "BW602", what, suggestion="run with the cache unquantized to see where the model overflows"
        )
    scale, zero_point = (_per_head(each) for each in _parts(parameters))
    fp8 = code.kind == "fp8"
    kind = QuantScheme(code="fp8_e4m3" if fp8 else "int", bits=8, group=None, scale_dtype=torch.float32)
    rows = (numbers - zero_point).flatten(0, -2)
    wide = scale.expand(*numbers.shape[:-1], 1).reshape(-1, 1)
    return encode(rows, parameters=Parameters(wide, None), scheme=kind).view(numbers.shape)


def _parts(parameters: StaticParameters) -> tuple[Tensor, Tensor]:
    return parameters.scale, parameters.zero_point


def _per_head(numbers: Tensor) -> Tensor:
    return numbers.view(1, -1, 1, 1)


def _given(parameters: StaticParameters | None) -> StaticParameters:
    if parameters is None:
        what = "codes with a calibrated scale need its parameters"
        raise ArgumentError("BW201", what, suggestion="bitwright calibrate MODEL makes them")
    return parameters


def _to_groups(x: Tensor, code: KVCode) -> Tensor:
    """Numbers that share a scale along the last of five dimensions: ``[batch, heads, tokens / group, groups, n]``."""
    batch, heads, tokens, width = x.shape
    if code.grain == "channel":
        if tokens % code.group:
            raise ValueError(f"{tokens} tokens are not whole groups of {code.group}")
        return x.view(batch, heads, tokens // code.group, code.group, width).transpose(3, 4).contiguous()
    return x.reshape(batch, heads, tokens, -1, min(code.group or width, width))


def _from_groups(groups: Tensor, code: KVCode) -> Tensor:
    """The inverse of :func:`_to_groups`."""
    batch, heads = groups.shape[:2]
    if code.grain == "channel":
        return groups.transpose(3, 4).reshape(batch, heads, -1, groups.shape[3])
    return groups.reshape(batch, heads, groups.shape[2], -1)
