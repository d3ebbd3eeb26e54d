"""In which format a plan's layers are stored: what each format is told, which can store all, and how much it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from bitwright.core.errors import BitwrightError
from bitwright.core.scheme import LayerScheme
from bitwright.formats import compressed_tensors
from bitwright.formats.records import Format, LayerRecord
from bitwright.formats.table import FORMATS, get_format
from bitwright.models.blocks import linear_weight
from bitwright.quantization.algorithms import Method
from bitwright.quantization.sources import Source

__all__ = ["choose_format", "fit_readers", "list_records", "output_bytes"]


def list_records(
    schemes: Mapping[str, LayerScheme], shapes: Mapping[str, tuple[int, int]], methods: Mapping[str, Method]
) -> dict[str, LayerRecord]:
    """What a format is told of each layer."""
    records = {}
    for name, scheme in schemes.items():
        method = methods[name]
        moves = bool(getattr(method.options[method.algorithm.round.name], "reorders", False))
        # Double quantization fixes all grids beforehand, so that columns may stay where they are.
        is_reordered = moves and scheme.weight.group is not None and scheme.weight.scale_scheme is None
        records[name] = LayerRecord(scheme, shapes[name], is_reordered)
    return records


def choose_format(
    records: Mapping[str, LayerRecord],
    skipped: Sequence[str],
    layers: Mapping[str, nn.Module],
    methods: Mapping[str, Method],
    wanted: str | None,
) -> Format:
    """The format asked for, or the most widely read one that can store every layer.

    Raises:
        BitwrightError: BW205 if none can.
    """
    for candidate in (get_format(wanted),) if wanted is not None else reversed(FORMATS):
        reason = _unfolded(candidate, methods) or _refusal(candidate, records, skipped, layers)
        if reason is None:
            return candidate
    raise BitwrightError(
        "BW205",
        f"the {candidate.name} format cannot store this model: {reason}",
        suggestion="--format native stores every scheme",
    )


def _unfolded(candidate: Format, methods: Mapping[str, Method]) -> str | None:
    """Scales of inputs that may stay outside the weights are known to the native format's readers alone."""
    for name, method in methods.items():
        stages = [stage.name for stage in method.algorithm.equalize]
        if candidate.name != "native" and any(not getattr(method.options[stage], "folding", True) for stage in stages):
            return f"{name}: {method.name} without folding may leave scales that its readers do not apply"
    return None


def fit_readers(
    schemes: Mapping[str, LayerScheme], layers: Mapping[str, nn.Module]
) -> tuple[dict[str, LayerScheme], tuple[str, ...]]:
    """Store the scales of bfloat16 layers in bfloat16: readers of compressed-tensors cast scales to the model's dtype.

    Were they stored more finely, those readers would compute with other weights than the ones that were measured.
    """
    fitted = dict(schemes)
    for name, scheme in schemes.items():
        if linear_weight(layers[name]).dtype == torch.bfloat16:
            fitted[name] = replace(scheme, weight=replace(scheme.weight, scale_dtype=torch.bfloat16))
    if fitted == dict(schemes):
        return fitted, ()
    return fitted, ("scales are stored in bfloat16, the model's dtype, in which readers of compressed-tensors compute",)


def _refusal(
    candidate: Format, records: Mapping[str, LayerRecord], skipped: Sequence[str], layers: Mapping[str, nn.Module]
) -> str | None:
    for name, record in records.items():
        if candidate.name != "native" and not isinstance(layers[name], nn.Linear):
            return f"{name} is a {type(layers[name]).__name__}, which its readers do not replace"
        reason = candidate.refuse(record.scheme, record.shape)
        if reason is not None:
            return f"{name}: {reason}"
    return candidate.refuse_together(records, skipped)


def output_bytes(
    source: Source, schemes: Mapping[str, LayerScheme], shapes: Mapping[str, tuple[int, int]], chosen: Format
) -> int:
    """What the weights will take on disk, to within the headers."""
    total = source.byte_count()
    element = total / max(1, sum(_numel(shape) for shape in source.shapes().values()))
    for name, scheme in schemes.items():
        out, columns = shapes[name]
        weight = scheme.weight
        groups = 1 if weight.group is None else -(-shapes[name][weight.axis] // weight.group)
        scales = groups * shapes[name][1 - weight.axis]
        scale_bits = 8 if weight.scale_scheme else weight.scale_dtype.itemsize * 8
        is_gptq = chosen.name.startswith("gptq")  # stores zero points of symmetric schemes, and each column's group
        has_zeros = is_gptq or not weight.symmetric
        zero_bits = 0 if not has_zeros else (weight.bits if weight.zero == "integer" else scale_bits)
        # Beside 8-bit activations that format keeps one code a byte.
        is_wide = scheme.activation is not None and chosen.name == compressed_tensors.FORMAT.name
        stored = (out * columns * (8 if is_wide else weight.bits) + scales * (scale_bits + zero_bits)) / 8
        stored += 4 * columns if is_gptq else 0
        total += int(stored - (out * columns * element if f"{name}.weight" in source.shapes() else 0))
    return total


def _numel(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
