"""The command that made a record, to be read elsewhere: folders of this machine go by the names of their options."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence

__all__ = ["told_command"]


def told_command(module: str, arguments: Sequence[str] | None = None) -> str:
    """``python -m MODULE ARGUMENTS``; a path outside the project that follows ``--work-dir`` reads ``WORK_DIR``."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    for place, argument in enumerate(given):
        option = given[place - 1] if place else ""
        if argument.startswith("/") and option.startswith("--"):
            given[place] = option.removeprefix("--").replace("-", "_").upper()
    return shlex.join(["python", "-m", module, *given])
