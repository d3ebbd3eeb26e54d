"""The compiled kernels, if this installation has them, and the instruction set that they use."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from bitwright.core.errors import ArgumentError
from bitwright.core.settings import read_settings

if TYPE_CHECKING:
    from torch import Tensor

try:
    from bitwright.kernels import _native
except ImportError:
    _MISSING: str | None = "the native kernels are not built here"
else:
    _MISSING = None

__all__ = ["BUILD", "address", "instruction_set", "instruction_sets", "missing", "use_instruction_set"]

BUILD = "install bitwright with a C++ compiler present, or run the model in plain torch"


def missing() -> str | None:
    """Why there are no native kernels; ``None`` if there are."""
    return _MISSING


def address(values: Tensor | None) -> int:
    """Where ``values`` lie, as the library takes it: 0 for nothing."""
    return 0 if values is None else values.data_ptr()


def instruction_sets() -> list[str]:
    """What this build and this processor have, best last; ``[]`` without native kernels."""
    return [] if _MISSING else _native.supported_isas()


def instruction_set() -> str:
    """The instruction set in use: the best, unless ``BITWRIGHT_ISA`` or ``use_instruction_set`` names another.

    Raises:
        ArgumentError: BW201 if ``BITWRIGHT_ISA`` names none that is supported here.
    """
    if _MISSING:
        return "none"
    _choose()
    return _native.selected_isa()


@cache
def _choose() -> None:
    wanted = read_settings().isa
    if wanted:
        use_instruction_set(wanted)


def use_instruction_set(name: str) -> None:
    """Compute with ``name`` from now on; not while another thread computes.

    Raises:
        ArgumentError: BW201 if it is not supported here.
    """
    if _MISSING or not _native.select_isa(name):
        accepted = "accepted here: " + (", ".join(instruction_sets()) or "none")
        raise ArgumentError("BW201", f"BITWRIGHT_ISA is {name!r}", why=_MISSING or "", suggestion=accepted)
