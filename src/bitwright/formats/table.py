"""The formats that bitwright writes and reads, in the order in which they are tried."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitwright.core.errors import BitwrightError
from bitwright.formats import compressed_tensors, native
from bitwright.formats.records import Format

__all__ = ["FORMATS", "find_format", "get_format"]

FORMATS: tuple[Format, ...] = (native.FORMAT, compressed_tensors.FORMAT)


def get_format(name: str) -> Format:
    """The format that is called ``name``.

    Raises:
        BitwrightError: BW201, listing the names.
    """
    for entry in FORMATS:
        if entry.name == name:
            return entry
    known = ", ".join(entry.name for entry in FORMATS)
    raise BitwrightError("BW201", f"there is no format {name!r}", suggestion=f"one of {known}")


def find_format(config: Mapping[str, Any]) -> Format:
    """The format of a checkpoint, from its ``quantization_config``.

    Raises:
        BitwrightError: BW311 if no format recognizes it.
    """
    for entry in FORMATS:
        if entry.recognize(config):
            return entry
    method = str(config.get("quant_method"))[:80]
    known = ", ".join(entry.name for entry in FORMATS)
    what = f"quantization method {method!r} is not one that bitwright reads"
    raise BitwrightError("BW311", what, suggestion=f"it reads {known}, and float checkpoints")
