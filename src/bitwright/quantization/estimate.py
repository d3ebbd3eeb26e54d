"""What a run will take, said before it starts: memory, disk and time, from sizes alone."""

from __future__ import annotations

import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from bitwright.core.errors import BitwrightError
from bitwright.core.memory import machine_memory
from bitwright.formats.checkpoint import WORK_DIRECTORY
from bitwright.quantization.calibration import CalibrationTokens
from bitwright.quantization.plan import Plan
from bitwright.quantization.sources import Source
from bitwright.quantization.stream import COMPARED_SAMPLES

__all__ = [
    "MEMORY_LEVERS",
    "Estimate",
    "activation_bytes",
    "check_resources",
    "estimate",
    "float_bytes",
    "seconds_a_flop",
]

PROGRAM_BYTES = 450 << 20  # the interpreter with torch and transformers
SECONDS_A_WEIGHT = 4e-9  # of one thread: fit, encode, measure, pack
PROBE = (512, 1024, 1024)  # a matrix product of about the size of the calibration's, to learn the machine's rate from
INSIDE_BYTES = 16  # for each token and feature of the widest layer: one sample inside a block
HESSIANS = 2  # of the largest width in float32, while a rounder works on it: the sums, and their factor
TUNED_BYTES = 16  # for each weight of a block that is tuned: what is learned, its gradient, and both moments
MEMORY_LEVERS = "fewer --samples, a shorter --seqlen, or a machine with more memory"


@dataclass(frozen=True, slots=True)
class Estimate:
    """``peak_bytes`` of resident memory; ``seconds`` of a large model: small ones take more, and not for arithmetic.

    ``work_bytes``: what is on the output's disk beside the checkpoint, until it is done: inputs of two blocks.
    """

    peak_bytes: int
    output_bytes: int
    seconds: float
    work_bytes: int = 0


def estimate(source: Source, plan: Plan, tokens: CalibrationTokens | None) -> Estimate:
    """Estimate a run: one block as floats, as codes and twice packed, the activations of every sample, and the sums of
    products, passes and numbers that move of the algorithms at work."""
    shapes = source.shapes()
    sizes = {unit.name: sum(torch.Size(shapes[name]).numel() for name in unit.tensors) for unit in plan.units}
    largest = max(size for unit, size in sizes.items() if any(u.name == unit and u.layers for u in plan.units))
    element = float_bytes(source, plan)
    peak = PROGRAM_BYTES + largest * (element + 3)
    quantized = sum(out * columns for out, columns in plan.shapes.values())
    seconds, work = quantized * SECONDS_A_WEIGHT, 0
    if tokens is not None:
        samples, seqlen = tokens.windows.shape
        widths = [plan.shapes[name][1] for name in plan.schemes]
        peak += activation_bytes(plan, tokens, element)
        work = seqlen * min(widths) * element * _flows(plan) * samples
        peak += max(sizes.get("outer", 0) * element - largest * element, 0)  # the embeddings, while inputs are made
        if any(method.algorithm.with_gram for method in plan.methods.values()):
            peak += 4 * (sum(width**2 for width in set(widths)) + (HESSIANS - 1) * max(widths) ** 2)
        if any(method.algorithm.tune for method in plan.methods.values()):
            peak += TUNED_BYTES * largest
        passes = _flows(plan) * samples + _training(plan, samples)
        flops = 2 * quantized * seqlen * passes + _products(plan, samples * seqlen)
        seconds += flops * seconds_a_flop(torch.float32 if element == 4 else torch.bfloat16)
    return Estimate(int(peak), plan.output_bytes, seconds / torch.get_num_threads(), work)


def float_bytes(source: Source, plan: Plan) -> int:
    """Of one number of the model before it is quantized."""
    return max(1, plan.source_bytes // max(1, sum(torch.Size(shape).numel() for shape in source.shapes().values())))


def activation_bytes(plan: Plan, tokens: CalibrationTokens, element: int) -> int:
    """The hidden states of every sample on both sides of a block, those that are compared, and one sample inside it."""
    samples, seqlen = tokens.windows.shape
    widths = [plan.shapes[name][1] for name in plan.schemes]
    states = _flows(plan) * samples + COMPARED_SAMPLES
    return seqlen * (min(widths) * element * states + max(widths) * INSIDE_BYTES)


def _flows(plan: Plan) -> int:
    """What enters a block and what leaves it, of the rounded model and maybe of the float one."""
    return 4 if plan.with_float_flow else 2


def _training(plan: Plan, samples: int) -> float:
    """Passes of a sample through the blocks that training is worth, by each algorithm's share of the layers."""
    total = 0.0
    for name in plan.schemes:
        method = plan.methods[name]
        total += sum(stage.passes(method.options[stage.name], samples) for stage in method.algorithm.stages)
    return total / max(1, len(plan.schemes))


def _products(plan: Plan, tokens: int) -> float:
    """Operations of the sums of products of the inputs, once for each width, and of the feedback of errors."""
    shapes = [plan.shapes[name] for name in plan.schemes if plan.methods[name].algorithm.with_gram]
    feedback = sum(out * columns * columns for out, columns in shapes)
    blocks = max(1, len(plan.blocks.modules))
    return feedback + blocks * sum(tokens * columns * columns for columns in {columns for _, columns in shapes})


def seconds_a_flop(dtype: torch.dtype) -> float:
    """Of one thread, in matrix products as this machine reaches them now; some milliseconds are spent to learn it."""
    rows, inner, columns = PROBE
    left, right = torch.ones(rows, inner, dtype=dtype), torch.ones(inner, columns, dtype=dtype)
    taken = []
    for _ in range(3):
        started = time.perf_counter()
        left @ right
        taken.append(time.perf_counter() - started)
    return min(taken) * torch.get_num_threads() / (2 * rows * inner * columns)


def check_resources(output: Path, plan: Plan, needed: Estimate) -> None:
    """Refuse a run that cannot end well, before it starts.

    Raises:
        BitwrightError: BW501 if the disk is too small, BW503 if the memory is.
    """
    written = sum(entry.stat().st_size for entry in output.glob("model-*.safetensors"))
    kept = sum(entry.stat().st_size for entry in (output / WORK_DIRECTORY).glob("inputs-*.safetensors"))
    room = int((plan.output_bytes - written) * 1.01) + max(0, needed.work_bytes - kept) + (1 << 20)
    free = shutil.disk_usage(output).free
    if free < room:
        raise BitwrightError(
            "BW501",
            f"the checkpoint needs {room / 1e9:.2f} GB more and {free / 1e9:.2f} GB are free",
            where=str(output.resolve()),
            why=f"with {needed.work_bytes / 1e9:.2f} GB for inputs of blocks, which are removed at the end",
            suggestion=f"free {(room - free) / 1e9:.2f} GB, or choose an output directory on another disk",
        )
    available = machine_memory()[1]
    if needed.peak_bytes > available:
        raise BitwrightError(
            "BW503",
            f"the run needs about {needed.peak_bytes / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are free",
            suggestion=MEMORY_LEVERS,
        )
