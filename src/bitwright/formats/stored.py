"""Reading the tensors of a layer, their dtypes and shapes checked against its record before any memory is taken."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.core.scheme import QuantScheme
from bitwright.formats.checkpoint import Checkpoint, list_names
from bitwright.formats.safetensors_file import DTYPES

__all__ = ["check_finite", "check_group_index", "check_names", "float16_scales", "read_checked", "unsigned_codes"]


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


def check_names(checkpoint: Checkpoint, required: Mapping[str, Set[str]], optional: Set[str]) -> None:
    """Check that each layer has its tensors and no others: names after the layer's own, ``required`` by layer.

    Raises:
        BitwrightError: BW303 naming the first five tensors that are missing, or that belong to no layer.
    """
    needed = {f"{layer}.{field}" for layer, fields in required.items() for field in fields}
    missing = [name for name in needed if name not in checkpoint.tensors]
    extra = [name for name in checkpoint.tensors if name not in needed and _is_stray(name, required, optional)]
    for names, problem in ((missing, "tensors of quantized layers are missing"), (extra, "unexpected tensors")):
        if names:
            what = f"{len(names)} {problem}: {list_names(names)}"
            suggestion = "fetch the model again: config.json and the weights are not of one version"
            raise BitwrightError("BW303", what, where=str(checkpoint.directory), suggestion=suggestion)


def _is_stray(name: str, layers: Mapping[str, Set[str]], optional: Set[str]) -> bool:
    """Whether a tensor bears the name of a quantized layer but is none of its optional ones."""
    position = name.find(".")
    while position >= 0:
        if name[:position] in layers:
            return name[position + 1 :] not in optional
        position = name.find(".", position + 1)
    return False


def unsigned_codes(codes: Tensor, scheme: QuantScheme) -> Tensor:
    """Codes (or zero points) counted from the smallest one, as uint8; those of ``uint`` schemes are so already."""
    return codes if codes.dtype == torch.uint8 else codes.view(torch.uint8) - (scheme.code_min & 0xFF)


def float16_scales(name: str, scale: Tensor) -> Tensor:
    """The scales of the layer ``name`` for a format that knows float16 alone: as they are.

    Where float16 would have lost them in fitting, they are float32, and readers cast what they read.

    Raises:
        BitwrightError: BW205 if one is too large for float16, which would be read as infinite.
    """
    if scale.dtype != torch.float16 and bool((scale.abs() > torch.finfo(torch.float16).max).any()):
        what = f"{name} has scales beyond the range of float16, in which the format stores them"
        raise BitwrightError("BW205", what, suggestion="--format native stores every scheme")
    return scale
