"""Linear layers of 8-bit activations (A8) with 8-bit or packed 4-bit weights, on the GPU's int8 matrix units."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import DYNAMIC_INT8, LayerScheme
from bitwright.kernels import reference
from bitwright.kernels.gpu import launch, library, linear
from bitwright.kernels.gpu.operand import order_columns
from bitwright.kernels.gpu.tokens import LONGEST, TokenCodes, TokenLayout, quantize_tokens
from bitwright.kernels.records import Kernel, KernelSpec, PackedWeight

__all__ = ["KERNEL", "multiply", "pack", "refuse", "run", "token_layout", "unpack"]

WORDS_CHUNK = 256  # columns of a chunk of packed 4-bit codes
MOST_STEP = 128  # columns of 8-bit codes that are multiplied at a time
PRODUCTS = (
    1 << 25
)  # bytes of whole-number products at a time: they stay in the second-level cache until they are scaled
FEATURES = 1024  # of the output at a time at least, however many rows


def refuse(spec: KernelSpec) -> str | None:
    """Why the layer cannot run here, or ``None``."""
    if spec.scheme.activation_group is not None:
        return "activations of one scale a token, not of groups"
    if spec.scheme.activation != DYNAMIC_INT8:
        return "activations of int8 alone"
    scheme, columns = spec.scheme.weight, spec.shape[1]
    group = min(scheme.group or columns, columns)
    is_power = group & (group - 1) == 0
    reasons = (
        (scheme.bits not in (4, 8), f"weights of 4 or 8 bits, not of {scheme.bits}"),
        (group < columns and not (is_power and group >= 32), f"groups of {scheme.group}, not 32, 64, 128..."),
        (columns > LONGEST, f"more than {LONGEST} input features"),
        (min(spec.shape) < 1, "an empty weight"),
        (spec.shape[0] % 8 != 0, f"{spec.shape[0]} output features, not a multiple of 8"),
    )
    missing = library.refuse_device(spec.device, library.INT8_MATRIX, "int8 matrix units")
    found = missing or next((reason for applies, reason in reasons if applies), None)
    if found is None and (scheme.bits == 4 or group < columns):  # beyond the vendor's dense product
        found = library.refuse_device(spec.device, library.PROGRAMMED, "4-bit codes or groups beside 8-bit activations")
    return found


def pack(tensor: QuantizedTensor, scheme: LayerScheme) -> PackedWeight:
    """The operand of ``tensor``, whose scheme is ``scheme.weight``, on the tensor's device.

    Raises:
        ValueError: if the schemes differ.
    """
    if tensor.scheme != scheme.weight:
        raise ValueError(f"a {scheme.weight.name} layer, but a {tensor.scheme.name} weight")
    if scheme.weight.bits == 4:
        packed = linear.pack_weight(tensor, scheme)
        tensors = dict(packed.tensors)
        if "zero" in tensors:
            tensors["zero"] = tensors["zero"].to(torch.int32)
        return replace(packed, tensors=tensors)
    return _pack_bytes(tensor, scheme)


def unpack(weight: PackedWeight) -> QuantizedTensor:
    """The tensor that was packed, equal in every field."""
    tensors, scheme, columns = dict(weight.tensors), weight.scheme.weight, weight.shape[1]
    if scheme.bits == 4:
        if "zero" in tensors:
            tensors["zero"] = tensors["zero"].to(torch.uint8)
        return linear.unpack(replace(weight, tensors=tensors))
    codes, order = tensors["codes"], tensors.get("order")
    if order is not None:
        present = order >= 0
        slots = codes[:, : order.numel()][:, present]
        codes = torch.empty_like(codes[:, :columns]).index_copy_(1, order[present].long(), slots)
    codes = codes[:, :columns].contiguous()
    shift = 0 if scheme.code == "int" else 128
    zero = tensors.get("float_zero")
    if zero is None and "zero" in tensors:
        zero = (tensors["zero"] + shift).to(scheme.code_dtype).t().contiguous()
    scale: Tensor | QuantizedTensor = tensors["scale"].t().contiguous()
    if scheme.scale_scheme is not None:
        nested = {name.removeprefix("scale."): part for name, part in tensors.items() if name.startswith("scale.")}
        layer, shape = LayerScheme(weight=scheme.scale_scheme), (1, tensors["scale"].numel())
        scale = reference.unpack(PackedWeight(scheme=layer, shape=shape, tensors=nested))
    return QuantizedTensor(
        scheme=scheme,
        codes=codes if scheme.code == "int" else codes.view(torch.uint8) ^ 0x80,
        scale=scale,
        zero=zero,
        group_index=tensors.get("group_index"),
    )


@library.beside
def run(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, invariant: bool = False) -> Tensor:
    """``x [..., in]`` times the weight, plus the bias: ``[..., out]`` in the dtype of ``x``; ``invariant`` as in
    :func:`bitwright.kernels.gpu.linear.run`.

    A token with a number that is not finite gives NaN: looking for it first would stop the GPU at every layer.
    """
    rows = x.detach().reshape(-1, weight.shape[1]).contiguous()
    if not rows.shape[0]:
        return x.new_empty(*x.shape[:-1], weight.shape[0])
    tokens = quantize_tokens(rows, token_layout(weight))
    found = multiply(tokens, weight, bias, x.dtype, invariant=invariant)
    return found.view(*x.shape[:-1], weight.shape[0])


KERNEL = Kernel(name="triton-int8", refuse=refuse, pack=pack, unpack=unpack, run=run)


def token_layout(weight: PackedWeight) -> TokenLayout:
    """How this layer wants its tokens."""
    order = weight.tensors.get("order")
    present = weight.shape[1] if order is None else order.numel()
    group, chunk, _ = _steps(weight)
    needs_sums = weight.scheme.weight.bits == 4 or not weight.scheme.weight.symmetric
    return TokenLayout(slots=-(-present // chunk) * chunk, present=present, group=group if needs_sums else 0,
                       groups=weight.tensors["scale"].shape[0], order=order)  # fmt: skip


def multiply(tokens: TokenCodes, weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype, *,
             invariant: bool = False, chosen: launch.LinearLaunch | None = None) -> Tensor:  # fmt: skip
    """Tokens in the layout of :func:`token_layout` times the weight: ``[rows, out]`` in ``dtype``."""
    tensors, scheme, out = weight.tensors, weight.scheme.weight, weight.shape[0]
    rows, slots = tokens.codes.shape
    group, chunk, span = _steps(weight)
    groups = tensors["scale"].shape[0]
    y = torch.empty(rows, out, dtype=dtype, device=tokens.codes.device)
    zero = "none" if scheme.symmetric and scheme.bits == 8 else "constant" if scheme.symmetric else scheme.zero
    operands = (tensors["scale"], tensors.get("zero", tensors["scale"]), tensors.get("remainder", tensors["scale"]))
    facts = library.describe(y.device)
    if chosen is None and _is_dense(tokens, weight, facts):
        return _multiply_dense(tokens, tensors["codes"], operands, zero, bias, y)
    chunks, of_group = slots // chunk, max(1, group // chunk) if groups > 1 else 1
    units = -(-chunks // of_group)  # no group is cut: its sum of codes is taken off once
    plan = chosen or launch.launch_integer(rows=rows, out=out, chunks=units, single=groups == 1, facts=facts,
                                           narrow=scheme.bits == 4 and span < MOST_STEP,
                                           invariant=invariant or library.is_invariant())  # fmt: skip
    split, each = launch.cut_columns(units, plan.split)
    tiles = -(-out // plan.block_n) * -(-rows // plan.block_m)
    size = tiles * split * plan.block_n * plan.block_m if split > 1 else 1
    partials = torch.empty(size, dtype=torch.int32 if groups == 1 else torch.float32, device=y.device)
    counters = tensors["counters"]
    if tiles > counters.numel():
        counters = torch.zeros(tiles, dtype=torch.int32, device=y.device)
    library.program("integer").integer[(tiles, split)](
        tokens.codes, tokens.scale, tokens.sums, tensors["codes"], *operands, partials if bias is None else bias, y,
        partials, counters, rows, out, slots, groups, chunks, each * of_group, of_group,
        BITS=scheme.bits, CHUNK=chunk, SPAN=span, ZERO=zero, SINGLE=groups == 1, HAS_BIAS=bias is not None,
        BLOCK_N=plan.block_n, BLOCK_M=plan.block_m, IS_SPLIT=split > 1,
        num_warps=plan.warps, num_stages=plan.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return y


def _multiply_dense(tokens: TokenCodes, weight: Tensor, operands: tuple[Tensor, ...], zero: str, bias: Tensor | None,
                    y: Tensor) -> Tensor:  # fmt: skip
    """``y [rows, out]`` by the vendor's product of whole numbers, some output features at a time."""
    rows, out = y.shape
    padding = max(0, launch.FEW_ROWS + 1 - rows)  # the vendor's product takes no fewer
    codes = functional.pad(tokens.codes, (0, 0, 0, padding)) if padding else tokens.codes
    parts = -(-out // max(FEATURES, PRODUCTS // (4 * codes.shape[0])))
    step = -(-out // (64 * parts)) * 64
    for first in range(0, out, step):
        last = min(first + step, out)
        products = torch._int_mm(codes, weight[first:last].t())
        library.program("integer").scale_products[(-(-(last - first) // 64), -(-rows // 32))](
            products, tokens.scale, tokens.sums, *(each[:, first:last] for each in operands),
            products if bias is None else bias[first:last], y[:, first:last], rows, last - first, out,
            ZERO=zero, HAS_BIAS=bias is not None, BLOCK_N=64, BLOCK_M=32, num_warps=4, enable_fp_fusion=False,
        )  # fmt: skip
    return y


def _is_dense(tokens: TokenCodes, weight: PackedWeight, facts: library.GpuFacts) -> bool:
    """Whether the vendor's int8 product takes these operands and is the faster way, or the only one."""
    is_single = weight.scheme.weight.bits == 8 and weight.tensors["scale"].shape[0] == 1
    is_due = tokens.codes.shape[0] >= launch.DENSE_INTEGER_ROWS or facts.capability < library.PROGRAMMED
    return is_single and is_due and tokens.codes.is_cuda and weight.shape[0] % 8 == 0


def _steps(weight: PackedWeight) -> tuple[int, int, int]:
    """Slots of a group; those of a chunk; those of a chunk that share a scale."""
    scheme, columns = weight.scheme.weight, weight.shape[1]
    groups, order = weight.tensors["scale"].shape[0], weight.tensors.get("order")
    if groups == 1:
        chunk = WORDS_CHUNK if scheme.bits == 4 else MOST_STEP
        present = columns if order is None else order.numel()
        return -(-present // chunk) * chunk, chunk, chunk
    assert scheme.group is not None
    group = scheme.group if order is None else order.numel() // groups
    chunk = WORDS_CHUNK if scheme.bits == 4 else min(MOST_STEP, group)
    return group, chunk, min(group, chunk)


def _pack_bytes(tensor: QuantizedTensor, scheme: LayerScheme) -> PackedWeight:
    """8-bit codes as signed bytes ``[out, slots]``, in whole steps."""
    weight, codes = scheme.weight, tensor.codes
    codes = codes if weight.code == "int" else (codes ^ 0x80).view(torch.int8)
    tensors: dict[str, Tensor] = {}
    group = min(weight.group or tensor.shape[1], tensor.shape[1])
    if tensor.group_index is not None:
        order = order_columns(tensor.group_index, tensor.group_count, group if tensor.group_count > 1 else 1)
        tensors |= {"group_index": tensor.group_index.clone(), "order": order}
        codes = codes[:, order.clamp(min=0).long()]
    step = MOST_STEP if tensor.group_count == 1 else min(MOST_STEP, group)
    tensors["codes"] = functional.pad(codes, (0, -codes.shape[1] % step)).contiguous()
    tensors["scale"] = tensor.dense_scale().t().contiguous()
    if isinstance(tensor.scale, QuantizedTensor):
        nested = reference.pack(tensor.scale, LayerScheme(weight=tensor.scale.scheme))
        tensors |= {f"scale.{name}": part for name, part in nested.tensors.items()}
    shift = 0 if weight.code == "int" else 128
    if tensor.zero is not None and weight.zero == "integer":
        tensors["zero"] = (tensor.zero.to(torch.int32) - shift).t().contiguous()
    elif tensor.zero is not None:
        exact = tensor.zero.to(torch.float32)
        nearest = exact.round().clamp(weight.code_min, weight.code_max)
        tensors["zero"] = (nearest.to(torch.int32) - shift).t().contiguous()
        tensors["remainder"] = (exact - nearest).t().contiguous()
        tensors["float_zero"] = tensor.zero.clone()
    tensors["counters"] = linear.new_counters(tensor.shape[0], codes.device)
    return PackedWeight(scheme=scheme, shape=tensor.shape, tensors=tensors)
