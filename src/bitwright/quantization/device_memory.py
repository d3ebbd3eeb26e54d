"""What a run takes of a GPU's memory, estimated from sizes and looked at before any work."""

from __future__ import annotations

import torch

from bitwright.core.errors import BitwrightError
from bitwright.kernels.gpu import library
from bitwright.quantization.calibration import CalibrationTokens
from bitwright.quantization.estimate import TUNED_BYTES, activation_bytes, float_bytes
from bitwright.quantization.plan import Plan
from bitwright.quantization.sources import Source
from bitwright.quantization.units import Unit

__all__ = ["DEVICE_LEVERS", "check_device", "device_bytes"]

DEVICE_LEVERS = "fewer --samples, a shorter --seqlen, another GPU, or --device cpu"
COPIES = 6  # float32 copies of the largest layer, or of its Hessian, that a rounder works with
BATCH = 8  # samples of a tuner's batch, whose activations are kept for the way back
KEPT = 12  # hidden states' worth of them for each token


def device_bytes(source: Source, plan: Plan, tokens: CalibrationTokens | None) -> int:
    """The most that a run holds on its device: two blocks' weights, one block's codes, sums of its inputs, activations.

    The block at work is there as floats, as codes, packed and decoded; the next one as floats.
    """
    shapes = source.shapes()
    element = float_bytes(source, plan)

    def size(unit: Unit) -> int:
        return sum(torch.Size(shapes[name]).numel() for name in unit.tensors)

    quantized = [plan.shapes[name] for name in plan.schemes]
    largest = max(size(unit) for unit in plan.units if unit.layers)
    layer = max(out * columns for out, columns in quantized)
    peak = largest * (2 * element + 2 + max(element, 4)) + COPIES * 4 * layer
    if tokens is None:
        return peak
    seqlen = tokens.windows.shape[1]
    narrow, width = min(columns for _, columns in quantized), max(columns for _, columns in quantized)
    if any(method.algorithm.with_gram for method in plan.methods.values()):
        peak += 4 * (COPIES * width**2 + sum({columns: columns**2 for _, columns in quantized}.values()))
    peak += activation_bytes(plan, tokens, element)
    if any(method.algorithm.tune for method in plan.methods.values()):
        peak += TUNED_BYTES * largest + BATCH * KEPT * seqlen * narrow * 4
    outer = sum(size(unit) for unit in plan.units if not unit.is_block)
    return peak + max(0, outer - largest) * element  # the embeddings, while inputs are made


def check_device(device: torch.device, needed: int) -> None:
    """Refuse a run that the device does not hold, before it starts.

    Raises:
        BitwrightError: BW503 naming both sizes.
    """
    room = library.usable_memory(device)
    if needed > room:
        what = f"the run needs about {needed / 1e9:.1f} GB on {device}, and {room / 1e9:.1f} GB of it can be used"
        raise BitwrightError("BW503", what, suggestion=DEVICE_LEVERS)
