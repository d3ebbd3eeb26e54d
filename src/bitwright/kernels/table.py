"""The kernels in order of preference. The first that accepts a layer runs it; the reference is last and accepts all."""

from __future__ import annotations

import warnings
from dataclasses import replace
from functools import cache

from bitwright.core import grid
from bitwright.core.errors import BitwrightError, Notice
from bitwright.core.scheme_names import parse
from bitwright.kernels import native, native_grid, reference
from bitwright.kernels.gpu import fp8 as gpu_fp8
from bitwright.kernels.gpu import integer as gpu_integer
from bitwright.kernels.gpu import linear as gpu_linear
from bitwright.kernels.records import Kernel, KernelSpec, PackedWeight

__all__ = ["KERNELS", "Kernel", "KernelSpec", "PackedWeight", "explain", "select"]

USUAL = ("w4g128", "w4g32", "w8g128", "w8", "w3g128", "w2g64")  # schemes that are named where another one cannot run
KERNELS: tuple[Kernel, ...] = (
    gpu_linear.KERNEL,
    gpu_integer.KERNEL,
    gpu_fp8.KERNEL,
    native.KERNEL,
    reference.KERNEL,
)
grid.use_loops(native_grid.LOOPS)


def select(spec: KernelSpec) -> Kernel:
    """The first kernel that accepts ``spec``.

    Raises:
        BitwrightError: BW206 if every kernel refuses, with each one's reason.
    """
    for kernel in KERNELS:
        if kernel.refuse(spec) is None:
            if spec.device.type == "cuda" and kernel is reference.KERNEL:
                _tell_once(spec.scheme.name, "; ".join(f"{name}: {reason}" for name, reason in explain(spec)[:-1]))
            return kernel
    reasons = "; ".join(f"{name}: {reason}" for name, reason in explain(spec))
    what = f"no kernel runs {spec.scheme.name} {list(spec.shape)} on {spec.device}"
    raise BitwrightError("BW206", what, why=reasons, suggestion=_nearest(spec))


def _nearest(spec: KernelSpec) -> str:
    """Which usual scheme, of about as many bits, some kernel runs for a layer of this shape on this device."""
    bits = spec.scheme.weight.bits
    usual = sorted(map(parse, USUAL), key=lambda scheme: abs(scheme.weight.bits - bits))
    for scheme in usual:
        if any(kernel.refuse(replace(spec, scheme=scheme)) is None for kernel in KERNELS):
            return f"quantize the model to {scheme.name}, which runs here"
    return "run the float model on this device; of quantized ones none of the usual schemes runs here"


@cache
def _tell_once(scheme: str, reasons: str) -> None:
    """That a layer on a GPU runs in plain torch, which is right but slow."""
    warnings.warn(Notice(f"no GPU kernel runs {scheme}; plain torch does, slowly ({reasons})"), stacklevel=3)


def explain(spec: KernelSpec) -> list[tuple[str, str | None]]:
    """Each kernel's name and why it refuses ``spec`` (``None``: it accepts), in order of preference.

    Example:
        >>> explain(KernelSpec(scheme=parse("w4g128"), shape=(64, 256), device=torch.device("cpu")))[-1]
        ('reference', None)
    """
    return [(kernel.name, kernel.refuse(spec)) for kernel in KERNELS]
