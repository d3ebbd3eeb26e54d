"""The kernels in order of preference. The first that accepts a layer runs it; the reference is last and accepts all."""

from __future__ import annotations

from bitwright.core.errors import BitwrightError
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
            return kernel
    reasons = "; ".join(f"{name}: {reason}" for name, reason in explain(spec))
    raise BitwrightError("BW206", f"no kernel runs {spec.scheme.name} {list(spec.shape)} on {spec.device}", why=reasons)


def explain(spec: KernelSpec) -> list[tuple[str, str | None]]:
    """Each kernel's name and why it refuses ``spec`` (``None``: it accepts), in order of preference.

    Example:
        >>> explain(KernelSpec(scheme=parse("w4g128"), shape=(64, 256), device=torch.device("cpu")))[-1]
        ('reference', None)
    """
    return [(kernel.name, kernel.refuse(spec)) for kernel in KERNELS]
