"""Linear layers of e4m3 activations (W8A8-fp8, W4A8-fp8) on GPUs that have fp8 matrix units.

Each token is coded with a scale of its own. Weights are e4m3 bytes with a scale a row, or 4-bit codes, whose distances
from their zero points are e4m3 numbers as they are; they lie as :mod:`bitwright.kernels.gpu.linear` packs them. The
products are summed by the matrix units, whose sums keep fewer bits than float32.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.core.errors import ArgumentError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import DYNAMIC_FP8, LayerScheme
from bitwright.kernels.gpu import launch, library, linear
from bitwright.kernels.gpu.operand import word_layout
from bitwright.kernels.gpu.tokens import LONGEST
from bitwright.kernels.records import Kernel, KernelSpec, PackedWeight

__all__ = ["KERNEL", "fp8_tokens", "multiply", "pack", "refuse", "run", "unpack"]

STEP = 128  # e4m3 columns multiplied at a time


def refuse(spec: KernelSpec) -> str | None:
    """Why the layer cannot run here, or ``None``."""
    if spec.scheme.activation != DYNAMIC_FP8:
        return "activations of e4m3 alone"
    scheme, columns = spec.scheme.weight, spec.shape[1]
    group = min(scheme.group or columns, columns)
    reasons = (
        (group < columns and group % 32 != 0, f"groups of {scheme.group}, not of a multiple of 32"),
        (columns > LONGEST, f"more than {LONGEST} input features"),
        (min(spec.shape) < 1, "an empty weight"),
        (scheme.is_codebook and scheme.scale_scheme is not None, "e4m3 codes with doubly quantized scales"),
    )
    missing = library.refuse_device(spec.device, library.FP8_MATRIX, "fp8 matrix units")
    return missing or next((reason for applies, reason in reasons if applies), None)


def pack(tensor: QuantizedTensor, scheme: LayerScheme) -> PackedWeight:
    """The operand of ``tensor``, whose scheme is ``scheme.weight``, on the tensor's device.

    Raises:
        ValueError: if the schemes differ.
    """
    if tensor.scheme != scheme.weight:
        raise ValueError(f"a {scheme.weight.name} layer, but a {tensor.scheme.name} weight")
    if scheme.weight.bits == 4:
        return linear.pack_weight(tensor, scheme)
    codes = functional.pad(tensor.codes, (0, -tensor.shape[1] % STEP)).contiguous()
    tensors = {"codes": codes, "scale": tensor.dense_scale().t().contiguous()}
    if tensor.group_index is not None:
        tensors["group_index"] = tensor.group_index.clone()
    tensors["counters"] = linear.new_counters(tensor.shape[0], codes.device)
    return PackedWeight(scheme=scheme, shape=tensor.shape, tensors=tensors)


def unpack(weight: PackedWeight) -> QuantizedTensor:
    """The tensor that was packed, equal in every field."""
    if weight.scheme.weight.bits == 4:
        return linear.unpack(weight)
    tensors = weight.tensors
    codes, scale = tensors["codes"][:, : weight.shape[1]].contiguous(), tensors["scale"].t().contiguous()
    return QuantizedTensor(
        scheme=weight.scheme.weight, codes=codes, scale=scale, group_index=tensors.get("group_index")
    )


def fp8_tokens(x: Tensor, slots: int) -> tuple[Tensor, Tensor]:
    """Each row of ``x`` (``[rows, columns]``, contiguous) as e4m3 bits, uint8 ``[rows, slots]``, and its scale.

    Raises:
        ArgumentError: BW201 if a row is longer than 65,536 numbers.
    """
    if slots > LONGEST:
        raise ArgumentError("BW201", f"rows of {slots} numbers", suggestion=f"accepted: at most {LONGEST}")
    codes = torch.empty(x.shape[0], slots, dtype=torch.uint8, device=x.device)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    width = 1 << max(4, (slots - 1).bit_length())
    library.program("fp8").fp8_tokens[(x.shape[0],)](
        x, codes, scale, x.shape[1], slots, WIDTH=width, num_warps=4 if width <= 2048 else 8, enable_fp_fusion=False
    )
    return codes, scale


@library.beside
def run(x: Tensor, weight: PackedWeight, bias: Tensor | None = None, *, invariant: bool = False) -> Tensor:
    """``x [..., in]`` in e4m3, a scale a row, times the weight, plus the bias: ``[..., out]`` in the dtype of ``x``;
    ``invariant`` as in :func:`bitwright.kernels.gpu.linear.run`.

    A token with a number that is not finite gives NaN.
    """
    tensors, (out, columns) = weight.tensors, weight.shape
    rows = x.detach().reshape(-1, columns)
    if not rows.shape[0]:
        return x.new_empty(*x.shape[:-1], out)
    if "order" in tensors:  # -1 is the column of zeros at the end
        rows = functional.pad(rows, (0, 1))[:, tensors["order"].long()]
    chunk = _chunk(weight)
    tokens = fp8_tokens(rows.contiguous(), -(-rows.shape[1] // chunk) * chunk)
    return multiply(tokens, weight, bias, x.dtype, invariant=invariant).view(*x.shape[:-1], out)


KERNEL = Kernel(name="triton-fp8", refuse=refuse, pack=pack, unpack=unpack, run=run)


def multiply(tokens: tuple[Tensor, Tensor], weight: PackedWeight, bias: Tensor | None, dtype: torch.dtype, *,
             invariant: bool = False, chosen: launch.LinearLaunch | None = None) -> Tensor:  # fmt: skip
    """Tokens of :func:`fp8_tokens`, filled up to whole chunks, times the weight: ``[rows, out]`` in ``dtype``;
    ``chosen`` overrides the launch."""
    (codes, scale), tensors, out, bits = tokens, weight.tensors, weight.shape[0], weight.scheme.weight.bits
    (rows, slots), chunk = codes.shape, _chunk(weight)
    y = torch.empty(rows, out, dtype=dtype, device=codes.device)
    chunks = slots // chunk
    plan = chosen or launch.launch_fp8(rows=rows, out=out, chunks=chunks, facts=library.describe(y.device),
                                       invariant=invariant or library.is_invariant())  # fmt: skip
    split, each = launch.cut_columns(chunks, plan.split)
    tiles = -(-out // plan.block_n) * -(-rows // plan.block_m)
    size = tiles * split * plan.block_n * plan.block_m if split > 1 else 1
    partials = torch.empty(size, dtype=torch.float32, device=y.device)
    counters = tensors["counters"]
    if tiles > counters.numel():
        counters = torch.zeros(tiles, dtype=torch.int32, device=y.device)
    group = chunk if bits == 8 else linear.group_slots(weight, word_layout(4))
    library.program("fp8").fp8_product[(tiles, split)](
        codes, scale, tensors["codes"], tensors["scale"], tensors.get("zero", codes), scale if bias is None else bias,
        y, partials, counters, rows, out, slots, tensors["scale"].shape[0], chunks, each,
        BITS=bits, CHUNK=chunk, GROUP=group, HAS_ZERO="zero" in tensors, HAS_BIAS=bias is not None,
        BLOCK_N=plan.block_n, BLOCK_M=plan.block_m, IS_SPLIT=split > 1,
        num_warps=plan.warps, num_stages=plan.stages, enable_fp_fusion=True,
    )  # fmt: skip
    return y


def _chunk(weight: PackedWeight) -> int:
    """Columns of a chunk, of which every program has some."""
    return STEP if weight.scheme.weight.bits == 8 else word_layout(4).chunk
