"""A checkpoint, layer by layer: how each is stored, what it costs, which kernel runs it and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.cli.tables import format_number, format_size, format_table
from bitwright.core.errors import BitwrightError

if TYPE_CHECKING:
    from bitwright.formats.checkpoint import Checkpoint
    from bitwright.formats.records import LayerRecord

__all__ = ["Inspection", "LayerFacts", "inspect", "render_inspection"]

REPORT = "report.json"
REPORT_LIMIT = 64 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerFacts:
    """One quantized layer.

    ``error``: relative error of its weights in the report, weighted by their inputs' power if those were seen.

    ``kernels``: each kernel's reason for refusing the layer on this machine's CPU; ``None``: it accepts.
    ``gpu_kernels``: the same on its GPU, if there is one that can be used.
    """

    name: str
    scheme: str
    shape: tuple[int, int]
    bytes: int
    bits_per_weight: float
    error: float | None
    kernel: str
    kernels: Mapping[str, str | None]
    gpu_kernels: Mapping[str, str | None] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """A checkpoint. ``format`` is ``float`` if nothing is quantized; ``float_bytes``: the rest, by dtype."""

    directory: str
    architecture: str
    format: str
    weight_bytes: int
    bits_per_weight: float | None
    layers: tuple[LayerFacts, ...]
    float_bytes: Mapping[str, int]
    recipe: Mapping[str, Any] | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def inspect(model: str | Path, *, verify: bool = False) -> Inspection:
    """Read the records of a checkpoint (a directory, a hub id or ``demo:``); no weight is read.

    Args:
        verify: first compare every file with the sha256 that was recorded when it was written.

    Raises:
        BitwrightError: BW301 to BW311 for a directory that is no sound checkpoint, BW314 for a file that is not
            what was written, or where there is no record to verify.
    """
    from bitwright.formats.checkpoint import open_checkpoint
    from bitwright.formats.checksums import CHECKSUMS, verify_files
    from bitwright.formats.table import find_format
    from bitwright.models.location import resolve_model

    directory = resolve_model(model)
    if verify and not verify_files(directory):
        advice = "only checkpoints that bitwright wrote have one"
        raise BitwrightError("BW314", f"{directory} has no record of checksums ({CHECKSUMS})", suggestion=advice)
    checkpoint = open_checkpoint(directory)
    report = _read_report(checkpoint.directory)
    quantization = checkpoint.quantization
    entry = find_format(quantization) if quantization is not None else None
    records = entry.layers(checkpoint) if entry is not None else {}
    layer_bytes, float_bytes = _layer_bytes(checkpoint, records)
    layers = tuple(_layer_facts(name, records[name], layer_bytes[name], report) for name in records)
    weights = sum(layer.shape[0] * layer.shape[1] for layer in layers)
    architectures = checkpoint.config.get("architectures")
    architecture = architectures[0] if isinstance(architectures, list) and architectures else None
    return Inspection(
        directory=str(checkpoint.directory),
        architecture=str(architecture or checkpoint.config.get("model_type", "unknown")),
        format=entry.name if entry is not None else "float",
        weight_bytes=sum(checkpoint.files.values()),
        bits_per_weight=8 * sum(layer.bytes for layer in layers) / weights if weights else None,
        layers=layers,
        float_bytes=float_bytes,
        recipe=report.get("recipe"),
    )


def _read_report(directory: Path) -> dict[str, Any]:
    """The report beside a checkpoint; provenance only, so one that cannot be read is as good as none."""
    path = directory / REPORT
    try:
        if path.is_symlink() or path.stat().st_size > REPORT_LIMIT:
            return {}
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return report if isinstance(report, dict) else {}


def _layer_facts(name: str, record: LayerRecord, size: int, report: Mapping[str, Any]) -> LayerFacts:
    import torch

    from bitwright.kernels.gpu import library
    from bitwright.kernels.table import KernelSpec, explain

    spec = KernelSpec(scheme=record.scheme, shape=record.shape, device=torch.device("cpu"))
    reasons = explain(spec)
    rows = report.get("layers")
    row = rows.get(name, {}) if isinstance(rows, dict) else {}
    error = row.get("weighted_error", row.get("relative_error")) if isinstance(row, dict) else None
    return LayerFacts(
        name=name,
        scheme=record.scheme.name,
        shape=record.shape,
        bytes=size,
        bits_per_weight=8 * size / max(1, record.shape[0] * record.shape[1]),
        error=error if isinstance(error, float) else None,
        kernel=next((kernel for kernel, reason in reasons if reason is None), "none"),
        kernels=dict(reasons),
        gpu_kernels=dict(explain(replace(spec, device=torch.device("cuda")))) if library.missing() is None else {},
    )


def _tensor_bytes(checkpoint: Checkpoint) -> Iterator[tuple[str, str, int]]:
    """Name, dtype and size of each tensor."""
    for name, stored in checkpoint.tensors.items():
        yield name, stored.entry.dtype, stored.entry.nbytes


def _layer_bytes(checkpoint: Checkpoint, layers: Collection[str]) -> tuple[dict[str, int], dict[str, int]]:
    """Bytes of each quantized layer (all under its name but the bias), and of everything else by dtype."""
    quantized = dict.fromkeys(layers, 0)
    rest: Counter[str] = Counter()
    for name, dtype, size in _tensor_bytes(checkpoint):
        parts = name.split(".")
        owner = next((prefix for end in range(1, len(parts)) if (prefix := ".".join(parts[:end])) in quantized), None)
        if owner is None or name == f"{owner}.bias":
            rest[dtype] += size
        else:
            quantized[owner] += size
    return quantized, dict(rest)


def render_inspection(inspection: Inspection, *, kernels: bool = False) -> str:
    """The checkpoint as text: a heading, then a row for each quantized layer."""
    rest = ", ".join(f"{format_size(size)} {dtype}" for dtype, size in sorted(inspection.float_bytes.items()))
    size = format_size(inspection.weight_bytes)
    lines = [
        f"{inspection.directory}: {inspection.architecture}, {inspection.format}, {size}",
        f"not quantized: {rest or 'nothing'}",
    ]
    if not inspection.layers:
        return "\n".join([*lines, "no layer is quantized"])
    lines.insert(1, f"{len(inspection.layers)} quantized layers, {inspection.bits_per_weight:.3f} bits per weight")
    rows = [
        [
            layer.name,
            layer.scheme,
            f"{layer.shape[0]} x {layer.shape[1]}",
            f"{layer.bits_per_weight:.3f}",
            format_number(layer.error),
            layer.kernel,
        ]
        for layer in inspection.layers
    ]
    lines += ["", format_table(["layer", "scheme", "shape", "bits/weight", "error", "kernel"], rows, left=2)]
    if kernels:
        lines += ["", *_render_kernels(inspection.layers)]
    return "\n".join(lines)


def _render_kernels(layers: tuple[LayerFacts, ...]) -> list[str]:
    """Every kernel's answer, once for all layers of one scheme that get the same answers."""
    groups: Counter[tuple[str, str, tuple[tuple[str, str | None], ...]]] = Counter()
    for layer in layers:
        groups[layer.scheme, "", tuple(layer.kernels.items())] += 1
        if layer.gpu_kernels:
            groups[layer.scheme, " on the GPU", tuple(layer.gpu_kernels.items())] += 1
    lines = []
    for (scheme, place, answers), count in groups.items():
        lines.append(f"kernels for {scheme}{place} ({count} layers), in order of preference:")
        lines += [f"  {name}: {'accepts' if reason is None else 'refuses: ' + reason}" for name, reason in answers]
    return lines
