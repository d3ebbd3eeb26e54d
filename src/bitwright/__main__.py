"""``python -m bitwright`` is the command ``bitwright``."""

from __future__ import annotations

import sys

from bitwright.cli import main

__all__: list[str] = []

sys.exit(main())
