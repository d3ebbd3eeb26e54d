"""Where a model is: the embedded one, a local directory, or a repository on the Hugging Face hub."""

from __future__ import annotations

import difflib
import importlib
import re
from pathlib import Path

from bitwright.core.errors import BitwrightError
from bitwright.models.embedded_model import embedded_directory

__all__ = ["DEMO", "near_names", "resolve_model"]

DEMO = "demo:"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_ID_LIMIT = 96


def resolve_model(text: str | Path) -> Path:
    """The local directory of a model: ``demo:`` is the embedded one; else a directory, else an id on the hub.

    A name without a directory of its own is looked up on the hub only if it cannot have been meant as a path. ``demo``
    without the colon works where no directory has that name.

    Raises:
        BitwrightError: BW301 if there is no such directory or repository (with the nearest names beside it), BW504 if
            the hub cannot be reached and the model is not in its cache.
    """
    name = str(text).strip()
    path = Path(name).expanduser() if name else None
    if path is not None and _is_directory(path) and name != DEMO:
        return path
    if name in (DEMO, DEMO.rstrip(":")):
        return embedded_directory()
    if path is None or name.startswith(DEMO):
        what = "the name of the model is empty" if path is None else f"there is no embedded model {name!r}"
        raise BitwrightError("BW301", what, suggestion="demo: for the embedded model, a directory, or an id on the hub")
    is_hub_id = HUB_ID.fullmatch(name) is not None and len(name) <= HUB_ID_LIMIT
    if isinstance(text, Path) or not is_hub_id or _exists(path) or _looks_local(path):
        raise _no_directory(path)
    hub = importlib.import_module("bitwright.models.hub")  # whose client takes a third of a second to import
    fetched: Path = hub.fetch_model(name)
    return fetched


def _is_directory(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):  # a name too long, or behind a directory that may not be read
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _looks_local(path: Path) -> bool:
    """``models/llama`` is a path if there is a directory ``models`` here."""
    return len(path.parts) > 1 and _is_directory(Path(path.parts[0]))


def _no_directory(path: Path) -> BitwrightError:
    what = f"{path} is a file" if _exists(path) else f"{path} does not exist"
    suggestion = f"the directory of the model: {path.parent}" if _exists(path) else near_names(path)
    return BitwrightError("BW301", what, why="a model is a directory with config.json", suggestion=suggestion)


def near_names(path: Path) -> str:
    """The siblings whose names are nearest."""
    try:
        siblings = sorted(entry.name for entry in path.parent.iterdir() if entry.is_dir())
    except (OSError, ValueError):
        return f"there is no directory {path.parent} either" if path.parent != path else ""
    near = difflib.get_close_matches(path.name, siblings, n=3, cutoff=0.4)
    if not near:
        return "check the spelling; demo: is the embedded model"
    return "nearest names: " + ", ".join(str(path.parent / name) for name in near)
