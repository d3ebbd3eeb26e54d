"""Reading the tensors of a layer, their dtypes and shapes checked against its record before any memory is taken."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import Checkpoint, list_names
from bitwright.formats.safetensors_file import DTYPES

__all__ = ["check_finite", "check_group_index", "read_checked", "require_layers"]


def read_checked(
    checkpoint: Checkpoint, name: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], *, field: str = ""
) -> Tensor:
    """Read the tensor ``name``, which must have one of ``dtypes`` and the shape ``shape``.

    Raises:
        BitwrightError: BW303 if there is none, BW304 if it has another dtype or shape (``field``: what calls for it).
    """
    stored = checkpoint.stored(name)
    entry = stored.entry
    if DTYPES.get(entry.dtype) not in dtypes or entry.shape != shape:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise BitwrightError(
            "BW304",
            f"{name} is {entry.dtype} {list(entry.shape)}; {wanted} {list(shape)} is called for",
            where=str(checkpoint.directory / stored.file),
            why=f"by {field or 'the record of the layer in quantization_config'}",
            suggestion="fetch the model again: config.json and the weights are not of one version",
        )
    return checkpoint.read(name)


def check_finite(name: str, values: Tensor) -> None:
    """Raises BW309 if a scale or float zero point is NaN or infinite."""
    if not bool(torch.isfinite(values).all()):
        count = int((~torch.isfinite(values)).sum())
        what = f"{name} holds {count} values that are NaN or infinite"
        raise BitwrightError("BW309", what, suggestion="the checkpoint is damaged: fetch it again")


def check_group_index(name: str, index: Tensor, groups: int) -> None:
    """Raises BW311 if a column belongs to a group that does not exist."""
    if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < groups:
        what = f"{name} points outside the {groups} groups of its layer"
        raise BitwrightError("BW311", what, suggestion="the checkpoint is damaged: fetch it again")


def require_layers(checkpoint: Checkpoint, needed: Mapping[str, str]) -> None:
    """Raises BW303 naming the layers (keys) whose tensors (values) are not in the files."""
    missing = [name for name, tensor in needed.items() if tensor not in checkpoint.tensors]
    if missing:
        what = f"{len(missing)} quantized layers have no weights in the files: {list_names(missing)}"
        raise BitwrightError("BW303", what, where=str(checkpoint.directory), suggestion="fetch the model again")
