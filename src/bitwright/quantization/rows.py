"""The report's row of one layer: what it was rounded to, and what that cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme
from bitwright.models.blocks import linear_weight
from bitwright.quantization.statistics import SiteStatistics

__all__ = ["layer_error", "layer_row"]

TILE = 1 << 18  # weights compared at a time, so that the float32 copies stay in cache


def layer_row(
    layer: nn.Module, tensor: QuantizedTensor, scheme: LayerScheme, statistics: SiteStatistics | None
) -> dict[str, Any]:
    """The report's row of one layer."""
    weight = linear_weight(layer)
    importance = None if statistics is None else statistics.sum_of_squares
    plain, weighted = _errors(weight, tensor, importance)
    row: dict[str, Any] = {
        "scheme": scheme.name,
        "shape": list(tensor.shape),
        "bits_per_weight": round(tensor.stored_bits() / weight.numel(), 4),
        "relative_error": plain,
    }
    if weighted is not None:
        row["weighted_error"] = weighted
    if statistics is not None and (dead := int((statistics.largest == 0).sum())):
        row["dead_inputs"] = dead  # channels that were zero in every token: calibration says nothing of their weights
    if isinstance(tensor.scale, Tensor) and tensor.scale.dtype != scheme.weight.scale_dtype:
        row["scale_dtype"] = str(tensor.scale.dtype).removeprefix(
            "torch."
        )  # the scheme's would have under- or overflowed
    return row


def layer_error(row: Mapping[str, Any]) -> float:
    """What a layer's row says of its error, to compare layers by: weighted by the inputs' power where they were seen.

    That one stays the same when an equalizer divides a weight's columns and multiplies its inputs.
    """
    return float(row.get("weighted_error", row["relative_error"]))


def _errors(weight: Tensor, tensor: QuantizedTensor, importance: Tensor | None) -> tuple[float, float | None]:
    """``|W - W'| / |W|`` in the Frobenius norm, and the same with each column weighted by its input's power."""
    difference, size = _square_sums(weight, tensor, 1.0)
    largest = float(weight.abs().amax().to(torch.float32)) if not 1e-20 < float(size.sum()) < 1e30 else 0.0
    if largest:  # float32 squares of such numbers over- or underflow
        difference, size = _square_sums(weight, tensor, largest)
    plain = float((difference.sum() / size.sum().clamp(min=1e-300)).sqrt())
    if importance is None:
        return plain, None
    return plain, float(((difference * importance).sum() / (size * importance).sum().clamp(min=1e-300)).sqrt())


def _square_sums(weight: Tensor, tensor: QuantizedTensor, unit: float) -> tuple[Tensor, Tensor]:
    """Sums of squares of the error and of the weight, by column (float64), in units of ``unit``."""
    difference = torch.zeros(weight.shape[1], dtype=torch.float64, device=weight.device)
    size = torch.zeros_like(difference)
    separable = tensor.scheme.axis == 1 and isinstance(tensor.scale, Tensor)
    rebuilt = None if separable else tensor.dequantize()
    count = max(1, TILE // weight.shape[1])
    for start in range(0, weight.shape[0], count):
        rows = slice(start, start + count)
        part = weight[rows].to(torch.float32)
        decoded = tensor.rows(rows).dequantize() if rebuilt is None else rebuilt[rows]
        error = part - decoded
        if unit != 1.0:
            error, part = error / unit, part / unit
        difference += error.square_().sum(0)
        size += part.square().sum(0)
    return difference, size
