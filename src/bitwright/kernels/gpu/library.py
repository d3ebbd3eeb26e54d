"""Whether Triton and a GPU can be used, what the GPU can do, and the programs, loaded when first needed.

Importing Triton takes a second, so nobody pays for it who has no layer on a GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, wraps
from types import ModuleType
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor

from bitwright.core.settings import read_settings

__all__ = [
    "FP8_MATRIX",
    "HEADROOM",
    "INT8_MATRIX",
    "OLDEST",
    "PROGRAMMED",
    "GpuFacts",
    "beside",
    "describe",
    "gpu_memory",
    "is_invariant",
    "missing",
    "on",
    "program",
    "refuse_device",
    "usable_memory",
]

Given = ParamSpec("Given")

HEADROOM = 0.08  # of a GPU's memory: the driver's own, graphs, and what the allocator cannot use

OLDEST = (7, 0)  # Volta
INT8_MATRIX = (7, 5)  # Turing: the first with int8 matrix units
PROGRAMMED = (8, 0)  # Ampere: the first whose matrix units Triton uses; before, only the vendor's products do
FP8_MATRIX = (8, 9)  # Ada and Hopper: the first with fp8 ones


@dataclass(frozen=True, slots=True, kw_only=True)
class GpuFacts:
    """What kernels are chosen by. ``capability`` is NVIDIA's number of the generation: (9, 0) for Hopper."""

    name: str
    capability: tuple[int, int]
    processors: int
    shared_bytes: int

    @property
    def has_bfloat16(self) -> bool:
        return self.capability >= (8, 0)


# What an unknown device is taken for where none can be asked: under the interpreter, and in a dry run.
UNKNOWN = GpuFacts(name="unknown", capability=(9, 0), processors=4, shared_bytes=227 << 10)


def missing() -> str | None:
    """Why there are no GPU kernels here; ``None`` if there are Triton and a GPU."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (bitwright[gpu])"
    return None if torch.cuda.is_available() else "no usable GPU is present"


@cache
def program(name: str) -> ModuleType:
    """The module of programs called ``name``.

    Raises:
        ModuleNotFoundError: without Triton.
    """
    return importlib.import_module(f"bitwright.kernels.gpu.programs.{name}")


def describe(device: torch.device) -> GpuFacts:
    """The facts of a device; of a CPU, on which only the interpreter runs, those of an unknown one."""
    if device.type != "cuda":
        return UNKNOWN
    index = torch.cuda.current_device() if device.index is None else device.index
    return _describe_cuda(index)


@cache
def _describe_cuda(index: int) -> GpuFacts:
    found = torch.cuda.get_device_properties(index)
    least = 99 << 10 if (found.major, found.minor) >= (8, 0) else 64 << 10  # what every GPU of these generations has
    shared = getattr(found, "shared_memory_per_block_optin", least)
    return GpuFacts(
        name=found.name,
        capability=(found.major, found.minor),
        processors=found.multi_processor_count,
        shared_bytes=shared,
    )


def on(device: torch.device) -> AbstractContextManager[object]:
    """A block whose launches go to ``device``: Triton launches on the current GPU, wherever the operands lie."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def beside(function: Callable[Concatenate[Tensor, Given], Tensor]) -> Callable[Concatenate[Tensor, Given], Tensor]:
    """``function`` with its launches :func:`on` the device of its first argument."""

    @wraps(function)
    def run(x: Tensor, /, *args: Given.args, **kwargs: Given.kwargs) -> Tensor:
        with on(x.device):
            return function(x, *args, **kwargs)

    return run


def refuse_device(device: torch.device, oldest: tuple[int, int] = OLDEST, what: str = "") -> str | None:
    """Why no program runs on ``device``, or ``None``; ``what`` names that for which ``oldest`` is needed."""
    if device.type != "cuda":
        return f"runs on an NVIDIA GPU, not on {device.type}"
    if missing() is not None:
        return missing()
    if torch.version.hip is not None:
        return "tried on NVIDIA GPUs alone"
    facts = describe(device)
    if facts.capability < oldest:
        reason = f"needs compute capability {oldest[0]}.{oldest[1]}"
        return f"{reason}{what and ' for ' + what}; {facts.name} has {facts.capability[0]}.{facts.capability[1]}"
    return None


def gpu_memory(device: torch.device) -> tuple[int, int]:
    """Bytes of a GPU that are free, those that torch keeps for later use among them, and all."""
    free, total = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), total


def usable_memory(device: torch.device) -> int:
    """Bytes of a GPU that may be filled: what is free, less the headroom."""
    free, total = gpu_memory(device)
    return max(0, free - int(HEADROOM * total))


@cache
def is_invariant() -> bool:
    """Whether a row's result must not depend on the other rows (``BITWRIGHT_INVARIANT``, read once)."""
    return read_settings().invariant
