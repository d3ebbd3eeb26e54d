"""The kernels in order of preference. The first that accepts a layer runs it; the reference is last and accepts all."""

from __future__ import annotations

import warnings
from functools import cache

from bitwright.core.errors import BitwrightError, Notice
from bitwright.kernels import native, reference
from bitwright.kernels.gpu import integer as gpu_integer
from bitwright.kernels.gpu import linear as gpu_linear
from bitwright.kernels.records import Kernel, KernelSpec, PackedWeight

__all__ = ["KERNELS", "Kernel", "KernelSpec", "PackedWeight", "explain", "select"]

KERNELS: tuple[Kernel, ...] = (gpu_linear.KERNEL, gpu_integer.KERNEL, native.KERNEL, reference.KERNEL)


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
    raise BitwrightError("BW206", f"no kernel runs {spec.scheme.name} {list(spec.shape)} on {spec.device}", why=reasons)


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
