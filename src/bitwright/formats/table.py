"""The formats that bitwright writes and reads.

The order counts twice. A ``quantization_config`` is offered to each in turn, so the versions of GPTQ that are written
only when asked for come before the one that takes the rest. And where the user names no format, the last one that can
store every layer is chosen: compressed-tensors, which most engines read, then the others, then native.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bitwright.core.errors import BitwrightError
from bitwright.formats import awq, compressed_tensors, gptq, native
from bitwright.formats.records import Format

__all__ = ["FORMATS", "find_format", "get_format"]

FORMATS: tuple[Format, ...] = (
    native.FORMAT,
    gptq.FORMAT_V1,
    gptq.FORMAT_V2,
    gptq.FORMAT,
    awq.FORMAT,
    compressed_tensors.FORMAT,
)


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
