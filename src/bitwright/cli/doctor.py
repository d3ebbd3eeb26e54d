"""What this machine offers: cores, instruction sets, GPU, memory, disk, the kernels that will run, what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bitwright import __version__
from bitwright.cli.tables import format_size, format_table
from bitwright.core.memory import machine_memory, read_system_file
from bitwright.core.settings import read_settings
from bitwright.kernels import native_library

__all__ = ["KernelChoice", "Machine", "doctor", "render_machine"]

PACKAGES = ("torch", "transformers", "numpy", "huggingface_hub")
# Instruction sets that make a difference to quantized arithmetic, as /proc/cpuinfo calls them.
ISA_FLAGS = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "asimddp", "i8mm", "bf16", "sve")
OPTIONAL = {
    "matplotlib": "`bitwright demo` draws its picture as text only: pip install 'bitwright[plot]'",
    "compressed_tensors": "needed by transformers (not by bitwright) to load what bitwright writes: "
    "pip install compressed-tensors",
}
SCHEMES = ("w4g128", "w4g128-asym", "w8", "w3g32", "nf4g64", "w8a8", "w4g32-a8g32", "A16W4", "A8W8")
KERNEL_SHAPE = (4096, 4096)  # of the layer that the kernels are asked about
GIB = float(1 << 30)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelChoice:
    """The kernel that runs ``scheme`` on ``device``, and each refused one with its reason."""

    scheme: str
    device: str
    kernel: str
    refused: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Facts, in bytes and counts. ``gpus``: name and memory; empty, with the reason in ``gpu_note``."""

    versions: Mapping[str, str]
    system: str
    processor: str
    cores: int
    usable_cores: int
    instruction_sets: tuple[str, ...]
    memory_bytes: int
    available_memory_bytes: int
    disk_free_bytes: Mapping[str, int]
    gpus: tuple[tuple[str, int], ...]
    gpu_note: str
    kernels: tuple[KernelChoice, ...]
    missing: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def doctor() -> Machine:
    """Look at this machine; nothing is changed and nothing is reached over a network."""
    processor, flags = _processor()
    total, available = machine_memory()
    gpus, gpu_note = _gpus()
    cache = read_settings().cache
    existing = next(path for path in (cache, *cache.parents) if path.exists())
    return Machine(
        versions={"bitwright": __version__, "python": platform.python_version()} | {p: _version(p) for p in PACKAGES},
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        processor=processor,
        cores=os.cpu_count() or 1,
        usable_cores=_usable_cores(),
        instruction_sets=tuple(flag for flag in ISA_FLAGS if flag in flags),
        memory_bytes=total,
        available_memory_bytes=available,
        disk_free_bytes={"here": shutil.disk_usage(Path.cwd()).free, "cache": shutil.disk_usage(existing).free},
        gpus=gpus,
        gpu_note=gpu_note,
        kernels=_kernels(has_gpu=bool(gpus)),
        missing=_missing(),
    )


def _missing() -> tuple[str, ...]:
    kernels = native_library.missing()
    slow = () if kernels is None else (f"{kernels}: quantized models run slowly; install again with a C++ compiler",)
    return slow + tuple(text for name, text in OPTIONAL.items() if importlib.util.find_spec(name) is None)


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _usable_cores() -> int:
    """Cores that this process may run on, and no more than its control group grants."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = read_system_file(Path("/sys/fs/cgroup/cpu.max")).partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        return max(1, min(affinity, round(int(quota) / int(period))))
    return affinity


def _processor() -> tuple[str, set[str]]:
    """Model name and feature flags."""
    fields: dict[str, str] = {}
    for line in read_system_file(Path("/proc/cpuinfo")).splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip(), value.strip())
    name = fields.get("model name") or platform.processor() or platform.machine()
    return name, set((fields.get("flags") or fields.get("Features") or "").split())


def _gpus() -> tuple[tuple[tuple[str, int], ...], str]:
    import torch

    if torch.version.cuda is None:
        return (), f"torch {torch.__version__} is built without CUDA"
    if not torch.cuda.is_available():
        return (), f"no usable GPU: none is present, or its driver does not fit CUDA {torch.version.cuda}"
    found = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return tuple((device.name, device.total_memory) for device in found), ""


def _kernels(*, has_gpu: bool) -> tuple[KernelChoice, ...]:
    import torch

    from bitwright.core.scheme_names import parse
    from bitwright.kernels.table import KernelSpec, explain, select

    choices = []
    for device in ("cpu", "cuda") if has_gpu else ("cpu",):
        for name in SCHEMES:
            spec = KernelSpec(scheme=parse(name), shape=KERNEL_SHAPE, device=torch.device(device))
            refused = {kernel: reason for kernel, reason in explain(spec) if reason is not None}
            choices.append(KernelChoice(scheme=name, device=device, kernel=select(spec).name, refused=refused))
    return tuple(choices)


def render_machine(machine: Machine) -> str:
    """The facts as text: a list, the table of kernels, then what is missing."""
    memory = f"{machine.available_memory_bytes / GIB:.1f} GiB free of {machine.memory_bytes / GIB:.1f} GiB"
    gpus = "; ".join(f"{name}, {size / GIB:.0f} GiB" for name, size in machine.gpus) or f"none ({machine.gpu_note})"
    disk = ", ".join(f"{format_size(free)} free {'in the ' if where == 'cache' else ''}{where}"
                     for where, free in machine.disk_free_bytes.items())  # fmt: skip
    facts = {
        "versions": ", ".join(f"{name} {number}" for name, number in machine.versions.items()),
        "system": machine.system,
        "processor": f"{machine.processor}, {machine.usable_cores} of {machine.cores} cores usable",
        "instructions": " ".join(machine.instruction_sets) or "none of those that matter here",
        "memory": memory,
        "disk": disk,
        "gpu": gpus,
    }
    lines = [f"{name:<13} {text}" for name, text in facts.items()]
    rows = [
        [
            choice.scheme,
            choice.device,
            choice.kernel,
            "; ".join(f"{k}: {reason}" for k, reason in choice.refused.items()),
        ]
        for choice in machine.kernels
    ]
    lines += ["", format_table(["scheme", "device", "kernel", "not chosen"], rows, left=4)]
    lines += ["", "nothing is missing" if not machine.missing else "missing:"]
    return "\n".join(lines + [f"  {text}" for text in machine.missing])
