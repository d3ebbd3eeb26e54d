"""Products of e4m3 activations (W8A8-fp8, W4A8-fp8) on GPUs that have fp8 matrix units.

No scheme of a layer asks for fp8 activations yet, so these are functions and not a row of the kernel table: tokens are
coded here with a scale of their own, and weights are those that :mod:`bitwright.kernels.gpu.linear` packs at 4 bits, or
plain e4m3 bytes. The e4m3 products are summed by the matrix units, whose sums keep fewer bits than float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.core.errors import ArgumentError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme
from bitwright.kernels.gpu import library, linear
from bitwright.kernels.gpu.operand import word_layout

__all__ = ["Fp8Weight", "fp8_linear", "fp8_tokens", "pack_fp8", "refuse_fp8"]

STEP = 128  # e4m3 columns multiplied at a time
LONGEST = 1 << 16
TILES = ((16, 64, 16, 4), (64, 64, 64, 4), (1 << 31, 128, 64, 8))  # rows up to, block_n, block_m, warps


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """``codes``: e4m3 bits uint8 ``[out, slots]``, or words of 4-bit codes; ``scale`` ``[groups, out]``; ``zero`` uint8
    likewise, or ``None``."""

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    shape: tuple[int, int]
    bits: int
    group: int


def refuse_fp8(tensor: QuantizedTensor, device: torch.device) -> str | None:
    """Why a weight cannot be multiplied by fp8 tokens on ``device``, or ``None``."""
    scheme, columns = tensor.scheme, tensor.shape[1]
    group = min(scheme.group or columns, columns)
    fp8_rows = scheme.code == "fp8_e4m3" and group >= columns
    four = scheme.bits == 4 and not scheme.is_codebook and scheme.zero == "integer" and scheme.axis == 1
    reasons = (
        (not (fp8_rows or four), "neither e4m3 with a scale a row nor 4-bit codes with whole zero points"),
        (four and group < columns and group % 32 != 0, f"groups of {group}, not of a multiple of 32"),
        (tensor.group_index is not None, "columns in another order"),
        (columns > LONGEST, f"more than {LONGEST} input features"),
    )
    found = next((reason for applies, reason in reasons if applies), None)
    return found or library.refuse_device(device, library.FP8_MATRIX, "fp8 matrix units")


def pack_fp8(tensor: QuantizedTensor) -> Fp8Weight:
    """The operand of a weight that :func:`refuse_fp8` does not refuse."""
    scheme, columns = tensor.scheme, tensor.shape[1]
    if scheme.code == "fp8_e4m3":
        codes = functional.pad(tensor.codes, (0, -columns % STEP)).contiguous()
        return Fp8Weight(codes, tensor.dense_scale().t().contiguous(), None, tensor.shape, 8, columns)
    packed = linear.pack_weight(tensor, LayerScheme(weight=scheme)).tensors
    group = columns if scheme.group is None or scheme.group >= columns else scheme.group
    whole = -(-columns // word_layout(4).chunk) * word_layout(4).chunk
    return Fp8Weight(packed["codes"], packed["scale"], packed.get("zero"), tensor.shape, 4,
                     whole if group == columns else group)  # fmt: skip


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


def fp8_linear(x: Tensor, weight: Fp8Weight, bias: Tensor | None = None) -> Tensor:
    """``x [..., in]`` in e4m3, a scale a row, times the weight, plus the bias: ``[..., out]`` in the dtype of ``x``."""
    out, columns = weight.shape
    rows = x.detach().reshape(-1, columns).contiguous()
    y = torch.empty(rows.shape[0], out, dtype=x.dtype, device=x.device)
    if not rows.shape[0]:
        return y.view(*x.shape[:-1], out)
    chunk = STEP if weight.bits == 8 else word_layout(4).chunk
    slots = -(-columns // chunk) * chunk
    codes, scale = fp8_tokens(rows, slots)
    _, block_n, block_m, warps = next(tile for tile in TILES if rows.shape[0] <= tile[0])
    grid = (-(-out // block_n) * -(-rows.shape[0] // block_m),)
    library.program("fp8").fp8_product[grid](
        codes, scale, weight.codes, weight.scale, codes if weight.zero is None else weight.zero,
        scale if bias is None else bias, y, rows.shape[0], out, slots, weight.scale.shape[0], slots // chunk,
        BITS=weight.bits, CHUNK=chunk, GROUP=weight.group, HAS_ZERO=weight.zero is not None, HAS_BIAS=bias is not None,
        BLOCK_N=block_n, BLOCK_M=block_m, num_warps=warps, num_stages=3, enable_fp_fusion=True,
    )  # fmt: skip
    return y.view(*x.shape[:-1], out)
