"""Options that several commands have, declared once."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["KV_HELP", "MODEL_HELP", "Json", "KVCache", "KVSafety", "Model", "Plain", "Seed", "Threads"]

MODEL_HELP = "A directory of config.json and safetensors, an id on the Hugging Face hub, or demo: (the embedded model)."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
Plain = Annotated[bool, typer.Option("--plain", help="Plain lines instead of a live display.")]
Threads = Annotated[int | None, typer.Option(help="Threads for arithmetic; as many as torch takes unless given.")]
Seed = Annotated[int, typer.Option(help="Seed of everything that is drawn.")]
KV_HELP = "How keys and values are stored: none, int8, int4-rotated, k8v4, int8-static (after calibrate) ..."
KVCache = Annotated[str, typer.Option("--kv-cache", metavar="SCHEME", help=KV_HELP)]
KVSafety = Annotated[
    str,
    typer.Option(
        "--kv-safety", help="Caches of 4 bits or less are tried first: warn, widen (8-bit keys where needed) or off."
    ),
]
