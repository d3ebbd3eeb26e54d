"""The command line. Everything heavy is imported by the command that needs it, so that ``--help`` answers at once."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (that of the process, unless given) and return the exit status.

    0 done; 1 a defect of bitwright; 2 usage; 3 model; 4 data; 5 resources; 6 numeric; 130 and 143 stopped by a signal.
    """
    from bitwright.cli.app import run

    return run(list(sys.argv[1:] if argv is None else argv))
