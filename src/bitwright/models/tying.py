"""Output heads that config.json calls tied to the embeddings, and the files hold with numbers of their own."""

from __future__ import annotations

import warnings
from collections.abc import Collection
from typing import Any

import torch
from torch import nn

from bitwright.core.errors import Notice
from bitwright.formats.checkpoint import Checkpoint
from bitwright.formats.safetensors_file import FileTensor
from bitwright.models.names import shared_names, stored_names

__all__ = ["untie_stored"]


def untie_stored(model: nn.Module, checkpoint: Checkpoint, available: Collection[str]) -> tuple[str, ...]:
    """Make two parameters of one with two names, where the files hold both and they differ, as transformers does.

    ``model`` is on the meta device; its configuration no longer says ``tie_word_embeddings`` then. Both tensors are
    read in pieces. Of a tied weight that is stored twice with the same bytes, as old files have it, nothing changes.

    Args:
        available: the names of stored tensors that may fill the model.

    Returns:
        The names that are parameters of their own now. A :class:`Notice` tells of each.

    Raises:
        BitwrightError: BW302 or BW303 if the tensors cannot be read, BW304 if torch has no such dtype.
    """
    untied = []
    for second, first in shared_names(model).items():
        mine, other = stored_names(model, second, available), stored_names(model, first, available)
        if not mine or not other or _is_same(checkpoint.source(mine[0]), checkpoint.source(other[0])):
            continue
        holder, _, leaf = second.rpartition(".")
        shared = model.get_parameter(first)
        model.get_submodule(holder)._parameters[leaf] = nn.Parameter(torch.empty_like(shared), requires_grad=False)
        untied.append(second)
        said = f"{mine[0]} and {other[0]} are both stored and differ, so they are not tied, whatever config.json says"
        warnings.warn(Notice(said), stacklevel=2)
    if untied:
        config: Any = getattr(model, "config", None)
        if config is not None:
            config.tie_word_embeddings = False
        for name in untied:
            getattr(model, "all_tied_weights_keys", {}).pop(name, None)
    return tuple(untied)


def _is_same(left: FileTensor, right: FileTensor) -> bool:
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return all(a == b for a, b in zip(left.chunks(), right.chunks(), strict=True))
