"""Calibrated ranges in the layout that LMDeploy's TurboMind reads."""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path

from bitwright.core.errors import ArgumentError
from bitwright.core.kv_scheme import KVCode
from bitwright.formats.storage import make_directory, write_file
from bitwright.models.kv_ranges import Range, Ranges, static_parameters

__all__ = ["export_lmdeploy", "refuse_ranks"]

LAYER = KVCode(bits=8, grain="static_layer")
SYMMETRIC = KVCode(bits=8, grain="static_layer", symmetric=True)


def export_lmdeploy(
    directory: Path, ranges: Mapping[int, Ranges], *, ranks: int = 1, symmetric: bool = False
) -> tuple[str, ...]:
    """Write ``layers.{i}.past_kv_scale.{rank}.weight`` for every layer and tensor-parallel rank; returns the names.

    Each holds little-endian float32 ``k_scale, k_zp, v_scale, v_zp`` of the heads of its rank (symmetric: ``k_scale,
    v_scale``).

    Raises:
        ArgumentError: BW201 if the heads do not divide among the ranks.
    """
    code = SYMMETRIC if symmetric else LAYER
    contents: dict[str, bytes] = {}
    for layer, found in ranges.items():
        heads = len(found["key"].low)
        refuse_ranks(heads, ranks, where=f"layer {layer}")
        for rank in range(ranks):
            own = slice(rank * heads // ranks, (rank + 1) * heads // ranks)
            numbers: list[float] = []
            for part in (found["key"], found["value"]):
                parameters = static_parameters(Range(part.low[own], part.high[own]), code)
                numbers.append(float(parameters.scale))
                numbers += [] if symmetric else [float(parameters.zero_point)]
            contents[f"layers.{layer}.past_kv_scale.{rank}.weight"] = struct.pack(f"<{len(numbers)}f", *numbers)
    make_directory(directory)
    for name, content in contents.items():
        write_file(directory / name, [content])
    return tuple(contents)


def refuse_ranks(heads: int, ranks: int, *, where: str) -> None:
    """Raises BW201 unless ``heads`` divide among ``ranks``."""
    if type(ranks) is not int or ranks < 1:
        raise ArgumentError("BW201", f"tensor-parallel is {ranks!r}", suggestion="a whole number, at least 1")
    if heads % ranks:
        what = f"{heads} heads of keys and values do not divide among {ranks} ranks"
        divisors = ", ".join(str(count) for count in range(1, heads + 1) if heads % count == 0)
        raise ArgumentError("BW201", what, where=where, suggestion=f"one of {divisors}")
