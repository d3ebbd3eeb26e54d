"""GPUs that are not here, as the launching code would describe them."""

from __future__ import annotations

from bitwright.kernels.gpu.library import GpuFacts

__all__ = ["A10", "ADA", "AMPERE", "GENERATIONS", "HOPPER", "TURING", "VOLTA"]

VOLTA = GpuFacts(name="Tesla V100", capability=(7, 0), processors=80, shared_bytes=96 << 10)
TURING = GpuFacts(name="Tesla T4", capability=(7, 5), processors=40, shared_bytes=64 << 10)
AMPERE = GpuFacts(name="NVIDIA A100", capability=(8, 0), processors=108, shared_bytes=163 << 10)
A10 = GpuFacts(name="NVIDIA A10", capability=(8, 6), processors=72, shared_bytes=99 << 10)  # Ampere with less memory
ADA = GpuFacts(name="NVIDIA L40S", capability=(8, 9), processors=142, shared_bytes=99 << 10)
HOPPER = GpuFacts(name="NVIDIA H200", capability=(9, 0), processors=132, shared_bytes=227 << 10)
GENERATIONS = {70: VOLTA, 75: TURING, 80: AMPERE, 89: ADA, 90: HOPPER}
