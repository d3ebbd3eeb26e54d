"""The kernel that is always right: plain torch, every scheme, every device.

Codes, integer zero points and the codes of doubly quantized scales are each one dense stream of bits, so the operand is
as small as the numbers themselves. A call decodes the weight by tiles of output rows and never holds it whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.core import bitpack, grid
from bitwright.core.codebook import FP8_MAX, decode_levels, encode_levels
from bitwright.core.grid import Parameters
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme, QuantScheme
from bitwright.kernels import integer
from bitwright.kernels.records import Kernel, KernelSpec, PackedWeight

__all__ = ["KERNEL", "TILE", "pack", "refuse", "run", "unpack"]

TILE = 1 << 20  # weights decoded at a time: 4 MB in float32


def refuse(_spec: KernelSpec) -> str | None:
    """Nothing is refused."""
    return None


def pack(tensor: QuantizedTensor, scheme: LayerScheme) -> PackedWeight:
    """The operand of ``tensor``, whose scheme is ``scheme.weight``.

    Raises:
        ArgumentError: BW202 for reordered columns beside groups of activations.
        ValueError: if the schemes differ.
    """
    if tensor.scheme != scheme.weight:
        raise ValueError(f"a {tensor.scheme.name} weight in a {scheme.name} layer")
    scheme.check_order(reordered=tensor.group_index is not None)
    return PackedWeight(scheme=scheme, shape=tensor.shape, tensors=_streams(tensor, ""))


def unpack(weight: PackedWeight) -> QuantizedTensor:
    """The tensor that was packed, equal in every field."""
    return _unstreamed(weight.tensors, "", weight.scheme.weight, weight.shape)


def run(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``x [..., in]`` times the weight, plus the bias: ``[..., out]`` in the dtype of ``x``."""
    rows = x.reshape(-1, weight.shape[1])
    activation = weight.scheme.activation
    multiply = _run_float if activation is None else _run_fp8 if activation.is_codebook else _run_integer
    y = multiply(rows, weight, None if bias is None else bias.to(x.dtype))
    return y.view(*x.shape[:-1], weight.shape[0])


KERNEL = Kernel(name="reference", refuse=refuse, pack=pack, unpack=unpack, run=run)


def _run_float(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Decode a tile to the dtype of ``x``, multiply, forget it."""
    dtype = x.dtype
    if dtype == torch.float16 and x.device.type == "cpu":  # several times faster, and nearer to the truth
        x, bias = x.to(torch.float32), None if bias is None else bias.to(torch.float32)
    tiles = list(_tiles(weight.shape))
    parameters = _parameters(weight)
    if len(tiles) == 1:
        return functional.linear(x, _decode(weight, parameters, tiles[0], x.dtype), bias).to(dtype)
    y = torch.empty(x.shape[0], weight.shape[0], dtype=dtype, device=x.device)
    for rows in tiles:
        part = None if bias is None else bias[rows]
        y[:, rows] = functional.linear(x, _decode(weight, parameters, rows, x.dtype), part)
    return y


@torch.no_grad()
def _run_integer(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Quantize each token to int8 and sum integer products (which have no gradient); see
    :mod:`bitwright.kernels.integer`."""
    assert weight.scheme.activation is not None
    y = torch.empty(x.shape[0], weight.shape[0], dtype=x.dtype, device=x.device)
    if not x.shape[0]:
        return y
    tokens = integer.quantize_tokens(x, weight.scheme.activation)
    parameters = _parameters(weight)
    index = weight.tensors.get("group_index")
    columns = integer.segments(weight.shape[1], weight.scheme.weight.group, index, weight.scheme.activation.group)
    for rows in _tiles(weight.shape):
        tile = Parameters(parameters.scale[rows], None if parameters.zero is None else parameters.zero[rows])
        products = integer.multiply(tokens, _codes(weight, rows), tile, columns, weight.scheme.weight)
        y[:, rows] = (products if bias is None else products.add_(bias[rows].to(torch.float32))).to(x.dtype)
    return y


@torch.no_grad()
def _run_fp8(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """Round each token to e4m3 with a scale of its own (largest magnitude / 448), and multiply in float32.

    The products of both sides' numbers are exact in float32. A token that is not finite gives NaN.
    """
    numbers = x.to(torch.float32)
    scale = (numbers.abs().amax(1, keepdim=True) / FP8_MAX).clamp_(min=torch.finfo(torch.float32).tiny)
    seen = decode_levels(encode_levels(numbers / scale, "fp8_e4m3"), "fp8_e4m3")
    return _run_float(seen * scale, weight, None if bias is None else bias.to(torch.float32)).to(x.dtype)


def _tiles(shape: tuple[int, int]) -> Iterator[slice]:
    step = max(1, TILE // max(1, shape[1]))
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _decode(weight: PackedWeight, parameters: Parameters, rows: slice, dtype: torch.dtype) -> Tensor:
    """Some output rows of the weight: ``[rows, in]`` in ``dtype``, computed in float32."""
    scheme, codes = weight.scheme.weight, _codes(weight, rows)
    scale, zero = parameters.scale, parameters.zero
    index = weight.tensors.get("group_index")
    if scheme.axis == 0:  # every row has the parameters of its group of rows
        group = torch.arange(rows.start, rows.stop, device=codes.device) // (scheme.group or weight.shape[0])
        scale, zero = scale[group], None if zero is None else zero[group]
        scheme = replace(scheme, axis=1, group=1)
    elif index is not None:
        scale, zero = scale[rows][:, index.long()], None if zero is None else zero[rows][:, index.long()]
        scheme = replace(scheme, group=1)
    else:
        scale, zero = scale[rows], None if zero is None else zero[rows]
    return grid.decode(codes, parameters=Parameters(scale, zero), scheme=scheme, dtype=dtype)


def _parameters(weight: PackedWeight) -> Parameters:
    """Scales and zero points of the whole weight, unpacked: small beside the codes, and forgotten after the call."""
    tensors, scheme = weight.tensors, weight.scheme.weight
    scale = tensors.get("scale")
    if scale is None:
        assert scheme.scale_scheme is not None
        other, groups = _parameter_shape(scheme, weight.shape, axis=1)
        nested = _unstreamed(tensors, "scale.", scheme.scale_scheme, (1, other * groups))
        scale = nested.dequantize().view(other, groups)
        scale = scale if scheme.axis == 1 else scale.t()
    return Parameters(scale, _zero(tensors, "", scheme, weight.shape))


def _parameter_shape(scheme: QuantScheme, shape: tuple[int, int], axis: int) -> tuple[int, int]:
    """``(other, groups)``, as double quantization lays scales out (axis 1), or as the scheme's own axis stores them."""
    size = shape[scheme.axis]
    groups = 1 if scheme.group is None else -(-size // scheme.group)
    other = shape[1 - scheme.axis]
    return (other, groups) if axis == 1 else (groups, other)


def _streams(tensor: QuantizedTensor, prefix: str) -> dict[str, Tensor]:
    """The operand's tensors: those of a doubly quantized scale have ``scale.`` before their names."""
    scheme = tensor.scheme
    streams = {prefix + "codes": _to_words(tensor.codes, scheme)}
    if isinstance(tensor.scale, QuantizedTensor):
        streams |= _streams(tensor.scale, prefix + "scale.")
    else:
        streams[prefix + "scale"] = tensor.scale.clone()
    if tensor.zero is not None:
        is_code = scheme.zero == "integer"
        streams[prefix + "zero"] = _to_words(tensor.zero, scheme) if is_code else tensor.zero.clone()
    if tensor.group_index is not None:
        streams[prefix + "group_index"] = tensor.group_index.clone()
    return streams


def _unstreamed(
    tensors: Mapping[str, Tensor], prefix: str, scheme: QuantScheme, shape: tuple[int, int]
) -> QuantizedTensor:
    scale: Tensor | QuantizedTensor | None = tensors.get(prefix + "scale")
    if scale is None:
        assert scheme.scale_scheme is not None
        other, groups = _parameter_shape(scheme, shape, axis=1)
        scale = _unstreamed(tensors, prefix + "scale.", scheme.scale_scheme, (1, other * groups))
    codes = _from_words(tensors[prefix + "codes"], scheme, 0, shape[0] * shape[1]).view(shape)
    zero = _zero(tensors, prefix, scheme, shape)
    index = tensors.get(prefix + "group_index")
    return QuantizedTensor(scheme=scheme, codes=codes, scale=scale, zero=zero, group_index=index)


def _zero(tensors: Mapping[str, Tensor], prefix: str, scheme: QuantScheme, shape: tuple[int, int]) -> Tensor | None:
    stored = tensors.get(prefix + "zero")
    if stored is None or scheme.zero == "float":
        return stored
    first, second = _parameter_shape(scheme, shape, axis=scheme.axis)
    return _from_words(stored, scheme, 0, first * second).view(first, second)


def _codes(weight: PackedWeight, rows: slice) -> Tensor:
    """The codes of some output rows, ``[rows, in]`` in the scheme's code dtype."""
    columns = weight.shape[1]
    scheme = weight.scheme.weight
    codes = _from_words(weight.tensors["codes"], scheme, rows.start * columns, rows.stop * columns)
    return codes.view(rows.stop - rows.start, columns)


def _to_words(codes: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes of any shape as one stream of bits, int32 ``[words]``, counted from the scheme's least code."""
    unsigned = codes.sub(scheme.code_min).view(torch.uint8) if scheme.code == "int" else codes
    words = bitpack.pack(unsigned.reshape(-1), scheme.bits)
    is_whole = words.untyped_storage().nbytes() == words.numel() * words.element_size()
    return words if is_whole else words.clone()  # a view would keep the padding of the last 32 codes alive


def _from_words(words: Tensor, scheme: QuantScheme, start: int, stop: int) -> Tensor:
    """Codes ``start`` to ``stop`` of a stream, ``[stop - start]`` in the scheme's code dtype."""
    bits, aligned = scheme.bits, start // 32 * 32  # 32 codes fill whole words, whatever their width
    first = aligned // 32 * bits
    part = words[first : first + bitpack.packed_words(stop - aligned, bits)]
    codes = bitpack.unpack(part, bits, stop - aligned)[start - aligned :]
    return codes.view(torch.int8).add_(scheme.code_min) if scheme.code == "int" else codes
