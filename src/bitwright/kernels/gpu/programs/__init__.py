"""What runs on the GPU. These modules import Triton, an optional dependency: :mod:`bitwright.kernels.gpu.library`
loads them when a layer first lies on a GPU, and nothing else may."""

from __future__ import annotations

__all__: list[str] = []
