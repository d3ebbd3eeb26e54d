"""What a run will take, said before it starts: memory, disk and time, from sizes alone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from bitwright.core.errors import BitwrightError
from bitwright.core.memory import machine_memory
from bitwright.quantization.calibration import CalibrationTokens
from bitwright.quantization.plan import Plan
from bitwright.quantization.sources import Source
from bitwright.quantization.stream import COMPARED_SAMPLES

__all__ = ["MEMORY_LEVERS", "Estimate", "check_resources", "estimate"]

PROGRAM_BYTES = 450 << 20  # the interpreter with torch and transformers
SECONDS_A_WEIGHT = 4e-9  # of one thread: fit, encode, measure, pack
SECONDS_A_FLOP = 1 / 60e9  # of one thread, in bf16 matrix products as torch reaches them
MEMORY_LEVERS = "fewer --samples, a shorter --seqlen, or a machine with more memory"


@dataclass(frozen=True, slots=True)
class Estimate:
    """``peak_bytes`` of resident memory; ``seconds``, to within a factor of about two."""

    peak_bytes: int
    output_bytes: int
    seconds: float


def estimate(source: Source, plan: Plan, tokens: CalibrationTokens | None) -> Estimate:
    """Estimate a run: one block as floats, as codes and twice packed, and the activations of every sample."""
    shapes = source.shapes()
    sizes = {unit.name: sum(torch.Size(shapes[name]).numel() for name in unit.tensors) for unit in plan.units}
    largest = max(size for unit, size in sizes.items() if any(u.name == unit and u.layers for u in plan.units))
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    element = max(1, plan.source_bytes // max(1, parameters))
    peak = PROGRAM_BYTES + largest * (element + 3)
    quantized = sum(out * columns for out, columns in plan.shapes.values())
    seconds = quantized * SECONDS_A_WEIGHT
    if tokens is not None:
        samples, seqlen = tokens.windows.shape
        width = max(columns for name, (_, columns) in plan.shapes.items() if name in plan.schemes)
        narrow = min(columns for name, (_, columns) in plan.shapes.items() if name in plan.schemes)
        peak += seqlen * narrow * element * (2 * samples + COMPARED_SAMPLES) + seqlen * width * 16
        peak += max(sizes.get("outer", 0) * element - largest * element, 0)  # the embeddings, while inputs are made
        seconds += 2 * 2 * quantized * samples * seqlen * SECONDS_A_FLOP
    return Estimate(int(peak), plan.output_bytes, seconds / torch.get_num_threads())


def check_resources(output: Path, plan: Plan, needed: Estimate) -> None:
    """Refuse a run that cannot end well, before it starts.

    Raises:
        BitwrightError: BW501 if the disk is too small, BW503 if the memory is.
    """
    written = sum(entry.stat().st_size for entry in output.glob("model-*.safetensors"))
    room = int((plan.output_bytes - written) * 1.01) + (1 << 20)
    free = shutil.disk_usage(output).free
    if free < room:
        raise BitwrightError(
            "BW501",
            f"the checkpoint needs {room / 1e9:.2f} GB more and {free / 1e9:.2f} GB are free",
            where=str(output.resolve()),
            suggestion=f"free {(room - free) / 1e9:.2f} GB, or choose an output directory on another disk",
        )
    available = machine_memory()[1]
    if needed.peak_bytes > available:
        raise BitwrightError(
            "BW503",
            f"the run needs about {needed.peak_bytes / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are free",
            suggestion=MEMORY_LEVERS,
        )
