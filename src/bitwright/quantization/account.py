"""The accounts of a run: what the plan says before it, and the report after it."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bitwright.core.recipe import Recipe
from bitwright.quantization.calibration import FEW_SAMPLES, CalibrationTokens
from bitwright.quantization.estimate import Estimate
from bitwright.quantization.journal import UnitRecord
from bitwright.quantization.plan import Plan, head_note
from bitwright.quantization.report import Report, versions
from bitwright.quantization.sources import Source

__all__ = ["make_report", "plan_facts", "sample_notices"]


def sample_notices(tokens: CalibrationTokens | None, samples: int) -> tuple[str, ...]:
    if tokens is None:
        return ()
    found = len(tokens.windows)
    fewer = f" (the text has no more than {tokens.available})" if found < samples else ""
    if found < FEW_SAMPLES:
        advice = f"statistics of wide layers will be noisy; {FEW_SAMPLES} or more are better"
        return (f"only {found} calibration samples{fewer}: {advice}",)
    return (f"{found} calibration samples instead of {samples}{fewer}",) if found < samples else ()


def plan_facts(
    name: str, plan: Plan, recipe: Recipe, tokens: CalibrationTokens | None, needed: Estimate, output: Path
) -> dict[str, Any]:
    """What will be done and what it will take, JSON-ready."""
    existing = next(path for path in (output, *output.absolute().parents) if path.is_dir())
    return {
        "model": name,
        "scheme": recipe.scheme.name,
        "algorithm": recipe.algorithm,
        "format": plan.format.name,
        "layers": len(plan.schemes),
        "left_float": len(plan.skipped),
        "overrides": _overrides(plan),
        "blocks": len(plan.blocks.modules),
        "calibration": None if tokens is None else list(tokens.windows.shape),
        "source_bytes": plan.source_bytes,
        "output_bytes": plan.output_bytes,
        "free_disk_bytes": shutil.disk_usage(existing).free,
        "peak_bytes": needed.peak_bytes,
        "seconds": round(needed.seconds, 1),
    }


def _overrides(plan: Plan) -> dict[str, list[str]]:
    """The layers that are not quantized as most are, by ``SCHEME by ALGORITHM(OPTION=VALUE, ...)``."""
    inside = {layer for unit in plan.units if unit.is_block for layer in unit.layers}
    found: dict[str, list[str]] = {}
    for layer in plan.overridden:
        method = plan.methods[layer]
        rounder = None if layer in inside else head_note(method).get("rounded_by")
        options = {stage: given for stage, given in method.options.items() if rounder in (None, stage)}
        how = f"{plan.schemes[layer].name} by {rounder or method.name}{_changed(options)}"
        found.setdefault(how, []).append(layer)
    return found


def _changed(options: Mapping[str, Any]) -> str:
    """The options of stages that are not as by default, with the stage where several have an option of that name."""
    owners = Counter(field.name for given in options.values() for field in dataclasses.fields(given))
    changed = [
        f"{f'{stage}.' if owners[field.name] > 1 else ''}{field.name}="
        f"{json.dumps(getattr(given, field.name), default=str)}"
        for stage, given in options.items()
        for field in dataclasses.fields(given)
        if getattr(given, field.name) != getattr(type(given)(), field.name)
    ]
    return f"({', '.join(changed)})" if changed else ""


def make_report(
    name: str,
    source: Source,
    plan: Plan,
    recipe: Recipe,
    tokens: CalibrationTokens | None,
    done: Sequence[UnitRecord],
    notices: tuple[str, ...],
) -> Report:
    """The report of a finished run, without its times."""
    found = {layer: row for record in done for layer, row in record.layers.items()}
    rows = {layer: found[layer] for layer in plan.schemes}  # in one order, whether or not they come from a journal
    quantized = sum(plan.shapes[layer][0] * plan.shapes[layer][1] for layer in rows)
    bits = sum(row["bits_per_weight"] * plan.shapes[layer][0] * plan.shapes[layer][1] for layer, row in rows.items())
    widened = [layer for layer, row in rows.items() if "scale_dtype" in row]
    if widened:
        notices += (
            f"scales of {len(widened)} layers are stored in float32: their dtype cannot hold them ({widened[0]})",
        )
    calibration = None
    if tokens is not None:
        count, length = tokens.windows.shape
        dropped = [number for record in done for number in record.dropped]
        calibration = {"source": tokens.source, "samples": count, "seqlen": length, "sha256": tokens.fingerprint()}
        calibration["dropped"] = dropped
    return Report(
        source=name,
        format=plan.format.name,
        recipe=recipe.to_dict(),
        calibration=calibration,
        layers=rows,
        blocks={r.unit: r.output_error for r in done if r.output_error is not None},
        unquantized=plan.skipped,
        parameters=sum(torch.Size(shape).numel() for shape in source.shapes().values()),
        quantized_parameters=quantized,
        bits_per_weight=round(bits / quantized, 4),
        source_bytes=plan.source_bytes,
        weight_bytes=sum(size for record in done for size in record.tensors.values()),
        notices=notices,
        versions=versions(),
    )
