"""How the golden native checkpoint was made. Its bytes are what version 1 of the format means: they never change.

python -m tests.golden.write_native tests/golden/native-1
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme, QuantScheme
from bitwright.core.scheme_names import parse
from bitwright.formats import native
from tests.formats.layers import write_checkpoint

__all__ = ["build_layers"]

NAMES = "w1 w2g16 w3g32-asym w4g32-sbf16 w5-asym-signed w6g16-axis0 w7 w8-sf32-a8 A16W4 nf4g16-dq".split()
SHAPE = (6, 40)


def build_layers() -> dict[str, tuple[QuantizedTensor, LayerScheme]]:
    """Layers whose numbers are counted, not drawn or computed: the same on any machine."""
    schemes = {f"model.layers.{number}.linear": parse(name) for number, name in enumerate(NAMES)}
    return {name: (_build(scheme.weight, SHAPE, 1), scheme) for name, scheme in schemes.items()}


def _build(scheme: QuantScheme, shape: tuple[int, int], step: int) -> QuantizedTensor:
    def count(size: tuple[int, int], step: int) -> torch.Tensor:
        return torch.arange(size[0] * size[1]).reshape(size) * step

    def codes(size: tuple[int, int], step: int) -> torch.Tensor:
        return (count(size, step) % (1 << scheme.bits) + scheme.code_min).to(scheme.code_dtype)

    size, other = shape[scheme.axis], shape[1 - scheme.axis]
    groups = 1 if scheme.group is None else -(-size // scheme.group)
    expected = (other, groups) if scheme.axis == 1 else (groups, other)
    scale: torch.Tensor | QuantizedTensor = ((count(expected, 3) % 31 + 1) / 32).to(scheme.scale_dtype)
    if scheme.scale_scheme is not None:
        scale = _build(scheme.scale_scheme, (1, groups * other), 11)
    zero = None
    if not scheme.symmetric and scheme.zero == "integer":
        zero = codes(expected, 5)
    elif not scheme.symmetric:
        zero = (count(expected, 7) % 29 / 2).to(scheme.scale_dtype)
    return QuantizedTensor(scheme=scheme, codes=codes(shape, step * 37), scale=scale, zero=zero)


if __name__ == "__main__":
    write_checkpoint(Path(sys.argv[1]), native.FORMAT, build_layers())
