"""Linear layers whose weight stays packed on the GPU, with activations as they are (A16): every width from 1 to 8 bits,
tables of levels and fp8, groups of whole runs of columns, any kind of zero point, columns in any order.

A few rows: the columns are split among programs, whose parts are added in a fixed order, so a result is the same on
every run. Many rows: the weight is unpacked a few thousand rows at a time and multiplied by the vendor's dense product,
which costs one more pass over the weight and nothing per row.
"""

from __future__ import annotations

from math import gcd
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.core.codebook import levels
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme, QuantScheme
from bitwright.kernels import reference
from bitwright.kernels.gpu import launch, library
from bitwright.kernels.gpu.operand import WordLayout, join_codes, order_columns, split_codes, word_layout
from bitwright.kernels.records import Kernel, KernelSpec, PackedWeight

__all__ = [
    "KERNEL",
    "expand",
    "group_slots",
    "multiply",
    "new_counters",
    "pack",
    "pack_weight",
    "refuse",
    "refuse_weight",
    "run",
    "unpack",
]

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
SMALLEST_TILE = 16  # output features; every tile of a launch has at least as many
EXPANDED = 1 << 26  # numbers of a weight that are unpacked at a time


def refuse(spec: KernelSpec) -> str | None:
    """Why the layer cannot run here, or ``None``."""
    if spec.scheme.activation is not None:
        return "activations of 16 bits alone"
    return library.refuse_device(spec.device) or refuse_weight(spec)


def refuse_weight(spec: KernelSpec) -> str | None:
    """Why a weight cannot be laid out for these kernels, or ``None``."""
    scheme, columns = spec.scheme.weight, spec.shape[1]
    run = word_layout(scheme.bits).run
    group = min(scheme.group or columns, columns)
    reasons = (
        (scheme.axis != 1, "groups along axis 0"),
        (min(spec.shape) < 1, "an empty weight"),
        (group < columns and group % run != 0, f"groups of {scheme.group}, not of a multiple of {run}"),
    )
    return next((reason for applies, reason in reasons if applies), None)


def pack(tensor: QuantizedTensor, scheme: LayerScheme) -> PackedWeight:
    """The operand of ``tensor``, whose scheme is ``scheme.weight``, on the tensor's device.

    Raises:
        ValueError: if the schemes differ.
    """
    if tensor.scheme != scheme.weight:
        raise ValueError(f"a {scheme.weight.name} layer, but a {tensor.scheme.name} weight")
    return pack_weight(tensor, scheme)


def pack_weight(tensor: QuantizedTensor, scheme: LayerScheme) -> PackedWeight:
    weight, layout = scheme.weight, word_layout(scheme.weight.bits)
    tensors: dict[str, Tensor] = {}
    codes = _to_unsigned(tensor.codes, weight)
    if tensor.group_index is not None:
        order = order_columns(tensor.group_index, tensor.group_count, layout.run)
        tensors["group_index"] = tensor.group_index.clone()
        tensors["order"] = order
        codes = codes[:, order.clamp(min=0).long()]
    tensors["codes"] = join_codes(codes, layout)
    tensors["scale"] = tensor.dense_scale().t().contiguous()
    if isinstance(tensor.scale, QuantizedTensor):
        nested = reference.pack(tensor.scale, LayerScheme(weight=tensor.scale.scheme))
        tensors |= {f"scale.{name}": part for name, part in nested.tensors.items()}
    if tensor.zero is not None:
        tensors |= _pack_zero(tensor.zero, weight)
    if weight.is_codebook and weight.bits == 4:
        tensors["levels"] = levels(weight.code).to(codes.device)
    tensors["counters"] = new_counters(tensor.shape[0], codes.device)
    return PackedWeight(scheme=scheme, shape=tensor.shape, tensors=tensors)


def new_counters(out: int, device: torch.device) -> Tensor:
    """How many programs of each tile are done; a launch leaves zeros. So one layer runs on one stream at a time."""
    return torch.zeros(-(-out // SMALLEST_TILE), dtype=torch.int32, device=device)


def unpack(weight: PackedWeight) -> QuantizedTensor:
    """The tensor that was packed, equal in every field."""
    tensors, scheme, (_, columns) = weight.tensors, weight.scheme.weight, weight.shape
    order = tensors.get("order")
    codes = split_codes(tensors["codes"], word_layout(scheme.bits), _slots(weight))
    if order is not None:
        present = order >= 0
        codes = torch.empty_like(codes[:, :columns]).index_copy_(1, order[present].long(), codes[:, present])
    scale: Tensor | QuantizedTensor = tensors["scale"].t().contiguous()
    if scheme.scale_scheme is not None:
        nested = {name.removeprefix("scale."): part for name, part in tensors.items() if name.startswith("scale.")}
        layer = LayerScheme(weight=scheme.scale_scheme)
        shape = (1, tensors["scale"].numel())
        scale = reference.unpack(PackedWeight(scheme=layer, shape=shape, tensors=nested))
    zero = tensors.get("float_zero")
    if zero is None and "zero" in tensors:
        zero = _from_unsigned(tensors["zero"].t().contiguous(), scheme)
    return QuantizedTensor(
        scheme=scheme,
        codes=_from_unsigned(codes, scheme),
        scale=scale,
        zero=zero,
        group_index=tensors.get("group_index"),
    )


@library.beside
def run(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, invariant: bool = False) -> Tensor:
    """``x [..., in]`` times the weight, plus the bias: ``[..., out]`` in the dtype of ``x``.

    ``invariant`` (or ``BITWRIGHT_INVARIANT``): a row's result is the same whatever other rows there are.
    """
    facts = library.describe(x.device)
    computed = torch.float16 if x.dtype == torch.bfloat16 and not facts.has_bfloat16 else x.dtype
    if computed not in DTYPES or (x.requires_grad and torch.is_grad_enabled()):
        return functional.linear(x, unpack(weight).dequantize(x.dtype), None if bias is None else bias.to(x.dtype))
    rows = x.detach().reshape(-1, weight.shape[1]).to(computed).contiguous()
    bias = None if bias is None else bias.detach().contiguous()
    invariant = invariant or library.is_invariant()
    if launch.expands(rows.shape[0], facts) and not invariant:
        y = _run_expanded(rows, weight, None if bias is None else bias.to(computed))
    else:
        y = multiply(rows, weight, bias, invariant=invariant)
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


KERNEL = Kernel(name="triton", refuse=refuse, pack=pack, unpack=unpack, run=run)


def multiply(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, invariant: bool = False,
             chosen: launch.LinearLaunch | None = None) -> Tensor:  # fmt: skip
    """``x [rows, in]`` times the weight on its codes as they lie: ``[rows, out]``; ``chosen`` overrides the launch."""
    tensors, scheme, (out, columns) = weight.tensors, weight.scheme.weight, weight.shape
    y = torch.empty(x.shape[0], out, dtype=x.dtype, device=x.device)
    if not x.shape[0]:
        return y
    words, scale = tensors["codes"], tensors["scale"]
    facts = library.describe(x.device)
    plan = chosen or launch.launch_linear(rows=x.shape[0], out=out, chunks=words.shape[0], bits=scheme.bits,
                                          itemsize=x.element_size(), facts=facts, invariant=invariant)  # fmt: skip
    split, each = launch.cut_columns(words.shape[0], plan.split)
    tiles = -(-out // plan.block_n) * -(-x.shape[0] // plan.block_m)
    size = tiles * split * plan.block_n * plan.block_m if split > 1 else 1
    partials = torch.empty(size, dtype=torch.float32, device=x.device)
    counters = tensors["counters"]
    if tiles > counters.numel():  # many rows and a fixed order of sums: rare, so their own
        counters = torch.zeros(tiles, dtype=torch.int32, device=x.device)
    library.program("linear").linear[(tiles, split)](
        x, words, scale, tensors.get("zero", scale), tensors.get("remainder", scale), tensors.get("levels", scale),
        tensors.get("order", words), x if bias is None else bias, y, partials, counters,
        x.shape[0], out, columns, _slots(weight), words.shape[0], scale.shape[0], each,
        **_constants(weight), HAS_BIAS=bias is not None, BLOCK_N=plan.block_n, BLOCK_M=plan.block_m, IS_SPLIT=split > 1,
        num_warps=plan.warps, num_stages=1 if "levels" in tensors else plan.stages, enable_fp_fusion=True,
    )  # fmt: skip  # a table's levels are looked up in the first-level cache, not copied ahead
    return y


def expand(weight: PackedWeight, first: int, last: int, dtype: torch.dtype) -> Tensor:
    """Rows ``first`` to ``last`` of the weight as ``dtype``: ``[last - first, in]``, rounded once."""
    tensors, columns = weight.tensors, weight.shape[1]
    words, scale = tensors["codes"], tensors["scale"]
    dense = torch.empty(last - first, columns, dtype=dtype, device=words.device)
    block = SMALLEST_TILE
    library.program("expansion").expand[(-(-(last - first) // block), words.shape[0])](
        words, scale, tensors.get("zero", scale), tensors.get("remainder", scale), tensors.get("levels", scale),
        tensors.get("order", words), dense, first, last, weight.shape[0], columns, _slots(weight), scale.shape[0],
        **_constants(weight), BLOCK_N=block, num_warps=4, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    return dense


def _run_expanded(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    out, columns = weight.shape
    step = max(SMALLEST_TILE, EXPANDED // columns // SMALLEST_TILE * SMALLEST_TILE)
    if step >= out:
        return functional.linear(x, expand(weight, 0, out, x.dtype), bias)
    y = torch.empty(x.shape[0], out, dtype=x.dtype, device=x.device)
    for first in range(0, out, step):
        last = min(first + step, out)
        dense = expand(weight, first, last, x.dtype)
        if bias is None:  # written where it belongs, without a copy
            torch.mm(x, dense.t(), out=y[:, first:last])
        else:
            torch.addmm(bias[first:last], x, dense.t(), out=y[:, first:last])
    return y


def _constants(weight: PackedWeight) -> dict[str, Any]:
    """What a program is compiled for."""
    scheme, tensors = weight.scheme.weight, weight.tensors
    layout = word_layout(scheme.bits)
    group = group_slots(weight, layout)
    parts = (*layout.parts, 0, 0)
    kind = "integer" if not scheme.is_codebook else "fp8" if scheme.code == "fp8_e4m3" else "table"
    zero = "none" if scheme.symmetric else scheme.zero
    return {
        "BITS": scheme.bits, "P0": parts[0], "P1": parts[1], "P2": parts[2], "WORDS": layout.words,
        "RUN": layout.run, "CHUNK": layout.chunk, "GROUP": group, "SPAN": gcd(group, layout.chunk), "KIND": kind,
        "ZERO": "doubled" if scheme.bits == 1 and scheme.symmetric else zero, "ORDERED": "order" in tensors,
    }  # fmt: skip


def _slots(weight: PackedWeight) -> int:
    """How many columns, or places for one, the words hold; the rest of the last chunk is padding."""
    return weight.tensors["order"].numel() if "order" in weight.tensors else weight.shape[1]


def group_slots(weight: PackedWeight, layout: WordLayout) -> int:
    """How many slots share a scale. Of a scale for a whole row, a chunk: there is no other group that a later one could
    have, and programs are the same for every length."""
    groups = weight.tensors["scale"].shape[0]
    if groups == 1:
        return layout.chunk
    if "order" in weight.tensors:
        return weight.tensors["order"].numel() // groups
    assert weight.scheme.weight.group is not None
    return weight.scheme.weight.group


def _to_unsigned(codes: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes (or zero points) counted from the least, uint8."""
    return codes.sub(scheme.code_min).view(torch.uint8) if scheme.code == "int" else codes


def _from_unsigned(codes: Tensor, scheme: QuantScheme) -> Tensor:
    return codes.view(torch.int8).add_(scheme.code_min) if scheme.code == "int" else codes


def _pack_zero(zero: Tensor, scheme: QuantScheme) -> dict[str, Tensor]:
    """Zero points as bytes; of float ones also what remains, and the number as it was stored."""
    if scheme.zero == "integer":
        return {"zero": _to_unsigned(zero, scheme).t().contiguous()}
    exact = zero.to(torch.float32)
    nearest = exact.round().clamp(scheme.code_min, scheme.code_max)
    return {
        "zero": (nearest - scheme.code_min).to(torch.uint8).t().contiguous(),
        "remainder": (exact - nearest).t().contiguous(),
        "float_zero": zero.clone(),
    }
