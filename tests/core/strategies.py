"""Random schemes and random matrices, whose rows are of every kind that has broken a quantizer somewhere."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import strategies as st
from torch import Tensor

from bitwright.core.scheme import CODEBOOK_BITS, DYNAMIC_INT8, LayerScheme, QuantScheme

__all__ = ["KINDS", "asymmetric_schemes", "integer_schemes", "layer_schemes", "matrices", "random_matrix", "schemes"]

DTYPES = st.sampled_from([torch.float16, torch.bfloat16, torch.float32])
GROUPS = st.one_of(st.none(), st.integers(1, 40), st.sampled_from([32, 64, 128]))
KINDS = (
    "normal",
    "constant",
    "zero",
    "positive",
    "negative",
    "tiny",
    "subnormal",
    "huge",
    "outlier",
    "distant",
    "integers",
    "mixed",
)


def _integer_fields(axis: int | None) -> dict[str, st.SearchStrategy[object]]:
    axes = st.sampled_from([0, 1]) if axis is None else st.just(axis)
    return {"bits": st.integers(1, 8), "group": GROUPS, "axis": axes, "scale_dtype": DTYPES}


def asymmetric_schemes(zero: str | None = None, axis: int | None = None) -> st.SearchStrategy[QuantScheme]:
    """Integer schemes with zero points, without double quantization."""
    codes, zeros = st.sampled_from(["int", "uint"]), st.sampled_from([zero] if zero else ["integer", "float"])
    return st.builds(QuantScheme, symmetric=st.just(False), code=codes, zero=zeros, **_integer_fields(axis))


def integer_schemes(axis: int | None = None) -> st.SearchStrategy[QuantScheme]:
    """Every integer scheme without double quantization."""
    return st.one_of(st.builds(QuantScheme, **_integer_fields(axis)), asymmetric_schemes(axis=axis))


def _table_schemes(axes: st.SearchStrategy[int]) -> st.SearchStrategy[QuantScheme]:
    kinds = st.sampled_from(sorted(CODEBOOK_BITS.items()))
    return st.builds(
        lambda kind, **fields: QuantScheme(code=kind[0], bits=kind[1], **fields),
        kinds,
        group=GROUPS,
        axis=axes,
        scale_dtype=DTYPES,
    )


@st.composite
def schemes(draw: st.DrawFn, double_quant: bool = True) -> QuantScheme:
    """Every valid scheme."""
    axes = st.sampled_from([0, 1])
    scheme = draw(st.one_of(integer_schemes(), _table_schemes(axes)))
    if double_quant and draw(st.booleans()):
        nested = draw(integer_schemes(axis=1))
        fields = {name: getattr(scheme, name) for name in QuantScheme.__dataclass_fields__}
        scheme = QuantScheme(**(fields | {"scale_scheme": nested}))
    return scheme


@st.composite
def layer_schemes(draw: st.DrawFn) -> LayerScheme:
    """Every valid pair of weight and activation schemes."""
    weight = draw(schemes())
    if weight.is_codebook or weight.axis != 1 or draw(st.booleans()):
        return LayerScheme(weight=weight)
    size = 1 if weight.group is None else weight.group
    divisors = [part for part in range(1, size + 1) if size % part == 0]
    group = draw(st.one_of(st.none(), st.sampled_from(divisors), st.integers(1, 40).map(lambda count: count * size)))
    return LayerScheme(weight=weight, activation=replace(DYNAMIC_INT8, group=group))


def _row(kind: str, columns: int, generator: torch.Generator) -> Tensor:
    row = torch.randn(columns, generator=generator)
    if kind == "mixed":
        pieces = [_row(other, columns, generator) for other in KINDS if other not in ("mixed", "huge")]
        choice = torch.randint(len(pieces), (columns,), generator=generator)
        return torch.stack(pieces).gather(0, choice.unsqueeze(0)).squeeze(0)
    if kind == "outlier":
        row[torch.randint(columns, (1,), generator=generator)] = 300.0
    return {
        "normal": row,
        "constant": row[:1].expand(columns),
        "zero": torch.zeros(columns),
        "positive": row.abs() + 0.01,
        "negative": -row.abs() - 0.01,
        "tiny": row * 1e-8,
        "subnormal": row * 1e-40,
        "huge": (row * 1e37).clamp(-1e38, 1e38),
        "outlier": row,
        "distant": 100 + row * 0.001,
        "integers": row.mul(10).round(),
    }[kind].clone()


def random_matrix(kinds: list[str], columns: int, seed: int) -> Tensor:
    """A float32 matrix with one row of each of ``kinds``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([_row(kind, columns, generator) for kind in kinds])


def matrices(*, kinds: tuple[str, ...] = KINDS, columns: int = 70) -> st.SearchStrategy[Tensor]:
    """Float32 matrices of 1 to 4 rows and 1 to ``columns`` columns."""
    rows = st.lists(st.sampled_from(kinds), min_size=1, max_size=4)
    return st.builds(random_matrix, rows, st.integers(1, columns), st.integers(0, 2**32 - 1))
