"""The native CPU kernel: packed integer and 16-level weights, exact or 8-bit activations, any number of tokens.

Rows lie in panels of 64, columns in blocks of 32; groups begin at whole blocks (csrc/kernels.h). A row's result is the
same in every batch and on any number of threads; with 8-bit activations, of one scale a token or one for each group of
its features, it equals the reference kernel's bit for bit.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.weak import WeakTensorKeyDictionary

from bitwright.core.codebook import levels
from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import DYNAMIC_FP8, LayerScheme, QuantScheme
from bitwright.kernels import native_library, reference
from bitwright.kernels.arena import Room, shared_room
from bitwright.kernels.records import Kernel, KernelSpec, PackedWeight

if native_library.missing() is None:
    from bitwright.kernels import _native

__all__ = ["KERNEL", "codes_bytes", "pack", "record", "refuse", "rounding", "run", "unpack"]

PANEL = 64
MOST_PADDING, SPARE_BYTES = 1.1, 16  # an operand of a larger multiple of what is stored is refused, tiny ones apart
BLOCK = 32
MAX_GROUP = 65536
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def refuse(spec: KernelSpec) -> str | None:
    """Why the layer cannot run here, or ``None``."""
    scheme = spec.scheme.weight
    columns = spec.shape[1]
    group, part = (min(size or columns, columns) for size in (scheme.group, spec.scheme.activation_group))
    reasons = (
        (native_library.missing() is not None, native_library.missing()),
        (spec.device.type != "cpu", f"runs on the CPU, not on {spec.device.type}"),
        (scheme.axis != 1, "groups along axis 0"),
        (scheme.code == "fp8_e4m3", "no fp8 weights"),
        (spec.scheme.activation == DYNAMIC_FP8, "no fp8 activations"),
        (min(spec.shape) < 1, "an empty weight"),
        (group < columns and group % BLOCK != 0, f"groups of {scheme.group}, not of a multiple of {BLOCK}"),
        (part < columns and part % BLOCK != 0, f"activations in groups of {part}, not of a multiple of {BLOCK}"),
        (group > MAX_GROUP, f"more than {MAX_GROUP} numbers share a scale"),
    )
    found = next((reason for applies, reason in reasons if applies), None)
    if found is None:
        native_library.instruction_set()
        operand, stored = _operand_bits(scheme, spec.shape), _stored_bits(scheme, spec.shape)
        if operand > max(MOST_PADDING * stored, stored + 8 * SPARE_BYTES):
            found = f"its operand would take {operand / stored:.2f} times what is stored"
    return found


def _stored_bits(scheme: QuantScheme, shape: tuple[int, int]) -> int:
    """What the layer takes when it is packed densely."""
    rows, columns = shape
    groups = -(-columns // min(scheme.group or columns, columns))
    nested = scheme.scale_scheme
    scale_bits = nested.bits if nested is not None else 8 * scheme.scale_dtype.itemsize
    zero_bits = 0 if scheme.symmetric else scheme.bits if scheme.zero == "integer" else scale_bits
    return rows * (columns * scheme.bits + groups * (scale_bits + zero_bits))


def _operand_bits(scheme: QuantScheme, shape: tuple[int, int]) -> int:
    """What the operand of the layer takes: whole panels of rows and blocks of columns, and scales that can be read."""
    rows, (slots, group) = shape[0], _layout(scheme, shape)
    nested = scheme.scale_scheme
    scale_bits = 32 + nested.bits if nested is not None else 8 * scheme.scale_dtype.itemsize
    zero_bits = 0 if scheme.symmetric else 8 if scheme.zero == "integer" else 8 * scheme.scale_dtype.itemsize
    return -(-rows // PANEL) * PANEL * (slots * _container_bits(scheme) + -(-slots // group) * (scale_bits + zero_bits))


def codes_bytes(scheme: QuantScheme, shape: tuple[int, int]) -> int:
    """What the codes of a layer take in its operand, if its columns keep their order."""
    return _native.codes_bytes(shape[0], _layout(scheme, shape)[0], _container_bits(scheme))


def pack(tensor: QuantizedTensor, scheme: LayerScheme, room: Room = shared_room) -> PackedWeight:
    """The operand of ``tensor``, whose scheme is ``scheme.weight``; its codes lie in ``room``.

    Raises:
        ArgumentError: BW202 for reordered columns beside groups of activations.
        ValueError: if the schemes differ.
    """
    weight = scheme.weight
    if tensor.scheme != weight:
        raise ValueError(f"a {weight.name} layer, but a {tensor.scheme.name} weight")
    scheme.check_order(reordered=tensor.group_index is not None)
    tensors: dict[str, Tensor] = {}
    slots, _ = _layout(weight, tensor.shape)
    if tensor.group_index is not None:
        tensors["group_index"] = tensor.group_index.clone()
        tensors["order"] = _order(tensor.group_index, tensor.group_count)
        slots = tensors["order"].numel()
    bits = _container_bits(weight)
    codes = _to_unsigned(tensor.codes, weight).contiguous()
    packed = room(_native.codes_bytes(tensor.shape[0], slots, bits))
    order = tensors["order"].data_ptr() if "order" in tensors else 0
    _native.pack_codes(codes.data_ptr(), *tensor.shape, slots, bits, order, packed.data_ptr(), torch.get_num_threads())
    tensors["codes"] = packed
    tensors["scale"] = _to_panels(tensor.dense_scale())
    if isinstance(tensor.scale, QuantizedTensor):
        nested = reference.pack(tensor.scale, LayerScheme(weight=tensor.scale.scheme))
        tensors |= {f"scale.{name}": part for name, part in nested.tensors.items()}
    if tensor.zero is not None:
        tensors |= _pack_zero(tensor.zero, weight)
    return PackedWeight(scheme=scheme, shape=tensor.shape, tensors=tensors)


def unpack(weight: PackedWeight) -> QuantizedTensor:
    """The tensor that was packed, equal in every field."""
    tensors, scheme, (rows, columns) = weight.tensors, weight.scheme.weight, weight.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    order = tensors.get("order")
    slots = _layout(scheme, weight.shape)[0] if order is None else order.numel()
    _native.unpack_codes(
        tensors["codes"].data_ptr(), rows, columns, slots, _container_bits(scheme),
        0 if order is None else order.data_ptr(), codes.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    scale: Tensor | QuantizedTensor = _from_panels(tensors["scale"], rows)
    if scheme.scale_scheme is not None:
        nested = {name.removeprefix("scale."): part for name, part in tensors.items() if name.startswith("scale.")}
        layer = LayerScheme(weight=scheme.scale_scheme)
        assert isinstance(scale, Tensor)
        scale = reference.unpack(PackedWeight(scheme=layer, shape=(1, scale.numel()), tensors=nested))
    zero = tensors.get("float_zero")
    if zero is None and "zero" in tensors:
        zero = _from_unsigned(_from_panels(tensors["zero"], rows), scheme)
    return QuantizedTensor(
        scheme=scheme,
        codes=_from_unsigned(codes.div_(2, rounding_mode="floor") if _is_doubled(scheme) else codes, scheme),
        scale=scale,
        zero=zero,
        group_index=tensors.get("group_index"),
    )


def run(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """``x [..., in]`` times the weight, plus the bias: ``[..., out]`` in the dtype of ``x``.

    Raises:
        BitwrightError: BW602 if activations that are to be rounded are not finite.
    """
    activation = weight.scheme.activation
    if x.dtype not in DTYPES or (activation is None and x.requires_grad and torch.is_grad_enabled()):
        return functional.linear(x, unpack(weight).dequantize(x.dtype), None if bias is None else bias.to(x.dtype))
    tokens = x.detach().reshape(-1, weight.shape[1]).contiguous()
    if bias is not None:
        bias = bias.detach().to(x.dtype).contiguous()
    y = torch.empty(*x.shape[:-1], weight.shape[0], dtype=x.dtype)
    is_finite = _native.linear(
        record(weight), tokens.data_ptr(), DTYPES[x.dtype], tokens.shape[0], 0 if bias is None else bias.data_ptr(),
        *rounding(weight), y.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    if not is_finite:
        suggestion = "the model overflows before this layer: load it with dtype float32"
        raise BitwrightError("BW602", "NaN or infinity among the values to quantize", suggestion=suggestion)
    return y


KERNEL = Kernel(name="native", refuse=refuse, pack=pack, unpack=unpack, run=run)


def rounding(weight: PackedWeight) -> tuple[int, int]:
    """How the library rounds what the layer reads: bits (16: it does not), and slots that share a scale (0: all)."""
    size = weight.scheme.activation_group
    if size is None:
        return (16 if weight.scheme.activation is None else 8), 0
    slots, group = _layout(weight.scheme.weight, weight.shape)
    return 8, size if size < weight.shape[1] else -(-slots // group) * group


def record(weight: PackedWeight) -> _native.Weight:
    """The operand as the library takes it: addresses of tensors of checked sizes. Made once for as long as those stay.

    Raises:
        ValueError: if the tensors are not of the sizes that scheme and shape call for.
    """
    codes = weight.tensors["codes"]
    places = [tensor.data_ptr() for tensor in weight.tensors.values()]
    known = _records.get(codes)
    if known is not None and known.scheme is weight.scheme and known.shape == weight.shape and known.places == places:
        return known.record
    made = _make_record(weight)
    _records[codes] = _Known(weight.scheme, weight.shape, places, made)
    return made


@dataclass(frozen=True, slots=True)
class _Known:
    """A record, and what it was made of."""

    scheme: LayerScheme
    shape: tuple[int, int]
    places: list[int]
    record: _native.Weight


_records: MutableMapping[Tensor, _Known] = WeakTensorKeyDictionary()  # by the tensor of the codes


def _make_record(weight: PackedWeight) -> _native.Weight:
    tensors, scheme, (rows, columns) = weight.tensors, weight.scheme.weight, weight.shape
    slots, group = _layout(scheme, weight.shape)
    scale, order = tensors["scale"], tensors.get("order")
    if order is not None:
        slots = order.numel()
        group = slots // scale.shape[1]
    bits = _container_bits(scheme)
    expected = (-(-rows // PANEL), -(-slots // group), PANEL)
    sizes_agree = tensors["codes"].numel() == _native.codes_bytes(rows, slots, bits) and scale.shape == expected
    if not sizes_agree or scale.device.type != "cpu":
        raise ValueError("the packed tensors are not those of the layer")
    zero, remainder = tensors.get("zero"), tensors.get("remainder")
    return _native.Weight(
        rows, columns, slots, group, bits, 1 << (scheme.bits - 1), DTYPES[scale.dtype],
        tensors["codes"].data_ptr(),
        scale.data_ptr(),
        0 if zero is None else zero.data_ptr(),
        0 if remainder is None else remainder.data_ptr(),
        0 if order is None else order.data_ptr(),
        levels(scheme.code).data_ptr() if scheme.is_codebook else 0,
    )  # fmt: skip


def _layout(scheme: QuantScheme, shape: tuple[int, int]) -> tuple[int, int]:
    """``(slots, slots of a group)`` where columns keep their order."""
    slots = -(-shape[1] // BLOCK) * BLOCK
    return slots, slots if scheme.group is None or scheme.group >= shape[1] else scheme.group


def _order(group_index: Tensor, groups: int) -> Tensor:
    """The column of each slot, or -1, int32 ``[slots]``: groups one after the other, all of the size of the largest."""
    counts = torch.bincount(group_index, minlength=groups)
    size = -(-int(counts.max()) // BLOCK) * BLOCK
    columns = torch.argsort(group_index, stable=True)
    place = torch.arange(columns.numel()) - (counts.cumsum(0) - counts)[group_index[columns].long()]
    order = torch.full((groups * size,), -1, dtype=torch.int32)
    order[group_index[columns].long() * size + place] = columns.to(torch.int32)
    return order


def _is_doubled(scheme: QuantScheme) -> bool:
    """One-bit symmetric codes are worth -1 and 1: stored as 0 and 2 around a zero of 1."""
    return scheme.bits == 1 and scheme.symmetric


def _container_bits(scheme: QuantScheme) -> int:
    return max(2, scheme.bits)


def _to_unsigned(codes: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes (or zero points) counted from the least, uint8."""
    unsigned = codes.sub(scheme.code_min).view(torch.uint8) if scheme.code == "int" else codes
    return unsigned * 2 if _is_doubled(scheme) else unsigned


def _from_unsigned(codes: Tensor, scheme: QuantScheme) -> Tensor:
    return codes.view(torch.int8).add_(scheme.code_min) if scheme.code == "int" else codes


def _to_panels(values: Tensor) -> Tensor:
    """``[rows, groups]`` to ``[panels, groups, 64]``, rows padded with zeros."""
    rows, groups = values.shape
    padded = functional.pad(values, (0, 0, 0, -rows % PANEL))
    return padded.view(-1, PANEL, groups).transpose(1, 2).contiguous()


def _from_panels(values: Tensor, rows: int) -> Tensor:
    return values.transpose(1, 2).reshape(-1, values.shape[1])[:rows].contiguous()


def _pack_zero(zero: Tensor, scheme: QuantScheme) -> dict[str, Tensor]:
    """Zero points as bytes; of float ones also what remains, and the number as it was stored."""
    if scheme.zero == "integer":
        return {"zero": _to_panels(_to_unsigned(zero, scheme))}
    exact = zero.to(torch.float32)
    nearest = exact.round().clamp(scheme.code_min, scheme.code_max)
    return {
        "zero": _to_panels((nearest - scheme.code_min).to(torch.uint8)),
        "remainder": _to_panels(exact - nearest),
        "float_zero": zero.clone(),
    }
