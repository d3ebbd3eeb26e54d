"""The environment variables that bitwright reads, all of them, in one place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Settings", "read_settings", "wait_passively"]


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


def wait_passively() -> None:
    """Let idle arithmetic threads sleep, unless ``OMP_WAIT_POLICY`` says otherwise; call it before torch is imported.

    By default they spin. On a quiet machine that gains little, and beside any other work two pools of spinning threads
    take each other's cores: the same evaluation then took five times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
