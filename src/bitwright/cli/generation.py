"""``bitwright generate`` on the screen: text as it comes."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import Any

from bitwright.cli.terminal import printable
from bitwright.core.memory import no_collections

__all__ = ["run_generate"]


def run_generate(model: str, prompt: str, options: Mapping[str, Any], *, as_json: bool) -> None:
    """Generate, printing each piece of text when it is there, or one JSON object at the end.

    Raises:
        BitwrightError: whatever :func:`bitwright.generate` raises.
    """
    with no_collections():
        from bitwright.models.generation import generate

    started = time.perf_counter()
    text = generate(model, prompt, **options, on_text=None if as_json else _print_piece)
    if as_json:
        seconds = round(time.perf_counter() - started, 3)
        print(json.dumps({"model": model, "prompt": prompt, "text": text, "seconds": seconds}))
    else:
        print()


def _print_piece(text: str) -> None:
    print(printable(text), end="", flush=True)
