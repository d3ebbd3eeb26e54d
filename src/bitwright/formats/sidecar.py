"""Where old GPTQ and AWQ checkpoints say how they are quantized: in a file of its own beside ``config.json``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from bitwright.formats.directory import find_file, read_object

__all__ = ["read_sidecar"]

SIDECARS = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
SIDECAR_LIMIT = 1 << 20


def read_sidecar(directory: Path, names: Collection[str]) -> dict[str, Any] | None:
    """What such a file of ``directory`` (which holds ``names``) would be as a ``quantization_config``, or ``None``.

    Raises:
        BitwrightError: BW310 if it is a link out of the directory, BW311 if it cannot be read.
    """
    for name, method in SIDECARS.items():
        path = find_file(directory, name) if name in names else None
        if path is not None:
            return {"quant_method": method, **read_object(path, code="BW311", limit=SIDECAR_LIMIT)}
    return None
