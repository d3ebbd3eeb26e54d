"""The environment variables that bitwright reads, all of them, in one place."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from bitwright.core.errors import ArgumentError

__all__ = ["CACHE_LIMIT", "Settings", "read_cache_limit", "read_settings", "wait_passively"]

CACHE_LIMIT = 4.0  # GiB


@dataclass(frozen=True, slots=True)
class Settings:
    """``BITWRIGHT_CACHE``: where reference logits are kept, and packed weights where that is asked for (default
    ``~/.cache/bitwright``).

    ``NO_COLOR``: any value turns colours off. ``BITWRIGHT_DEBUG``: any value shows tracebacks, as ``--debug`` does.
    ``BITWRIGHT_ISA``: the instruction set of the native kernels (``scalar``, ``avx2``, ``avx512``, ``avx512_vnni``,
    ``avx512_bf16``); the best that the processor has, unless set. ``BITWRIGHT_INVARIANT``: any value makes products on
    a GPU add in an order that does not depend on how many rows there are, which costs speed; on a CPU they always do.
    """

    cache: Path
    no_color: bool
    debug: bool
    isa: str | None = None
    invariant: bool = False


def read_settings() -> Settings:
    """Read the environment now; nothing is cached, so a changed variable takes effect at the next call."""
    cache = os.environ.get("BITWRIGHT_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "bitwright"
    return Settings(
        cache=Path(cache) if cache else base,
        no_color=bool(os.environ.get("NO_COLOR")),
        debug=bool(os.environ.get("BITWRIGHT_DEBUG")),
        isa=os.environ.get("BITWRIGHT_ISA") or None,
        invariant=bool(os.environ.get("BITWRIGHT_INVARIANT")),
    )


def read_cache_limit() -> int:
    """How many bytes reference logits may take on disk, and packed weights: each at most ``BITWRIGHT_CACHE_LIMIT`` GiB.

    4 unless set; 0 keeps no logits.

    Raises:
        ArgumentError: BW201 if the variable is not such a number.
    """
    given = os.environ.get("BITWRIGHT_CACHE_LIMIT") or str(CACHE_LIMIT)
    try:
        limit = float(given)
    except ValueError:
        limit = math.nan
    if not 0 <= limit < math.inf:
        what = f"BITWRIGHT_CACHE_LIMIT is {given!r}"
        raise ArgumentError("BW201", what, suggestion="a number of GiB, 0 or more: 0.5, 4, 20")
    return int(limit * (1 << 30))


def wait_passively() -> None:
    """Let idle arithmetic threads sleep, unless ``OMP_WAIT_POLICY`` says otherwise; call it before torch is imported.

    By default they spin. On a quiet machine that gains little, and beside any other work two pools of spinning threads
    take each other's cores: the same evaluation then took five times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
