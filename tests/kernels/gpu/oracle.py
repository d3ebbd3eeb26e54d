"""What the programs are held against: the same products in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme
from bitwright.core.scheme_names import parse

__all__ = ["TOLERANCE", "layer", "relative_error"]

# Of outputs rounded to a dtype, whose sums were exact to float32; bfloat16 weights of a table are rounded, too.
TOLERANCE = {torch.float16: 6e-4, torch.bfloat16: 6e-3, torch.float32: 1e-6}


def layer(name: str, out: int, columns: int, *, shuffled: bool = False) -> tuple[QuantizedTensor, LayerScheme]:
    """A random weight in the scheme called ``name``; ``shuffled``: its groups are no runs of columns."""
    scheme = parse(name)
    tensor = QuantizedTensor.quantize(torch.randn(out, columns), scheme.weight)
    if shuffled:
        assert scheme.weight.group is not None
        index = (torch.arange(columns, dtype=torch.int32) // scheme.weight.group)[torch.randperm(columns)]
        tensor = QuantizedTensor(
            scheme=scheme.weight, codes=tensor.codes, scale=tensor.scale, zero=tensor.zero, group_index=index
        )
    return tensor, scheme


def relative_error(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference, relative to that of ``exact``."""
    return float((found.double() - exact).norm() / exact.norm())
