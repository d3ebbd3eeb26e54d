"""Quantized layers as a model has them, where the files hold several of them as rows of one.

A format reads a layer as it is stored, under the name that it has in the files. What it gives is taken apart here: rows
of codes, scales and zero points, and the group of each column, which all rows share. No number changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.formats.checkpoint import Checkpoint
from bitwright.formats.fused import Part
from bitwright.formats.records import Format, LayerRecord

__all__ = ["PartReader", "StoredLayer", "find_parts"]


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """A linear layer of a model, and where it lies.

    Attributes:
        name: of the layer in the files that it is, or is some rows ``[first, end)`` of; no ``rows``: all.
        whole: the record of that layer.
        bias: the name under which the checkpoint has its bias, if it has one.
    """

    name: str
    whole: LayerRecord
    bias: str
    rows: tuple[tuple[int, int], ...] = ()

    @property
    def record(self) -> LayerRecord:
        """The layer's own."""
        if not self.rows:
            return self.whole
        return replace(self.whole, shape=(sum(end - first for first, end in self.rows), self.whole.shape[1]))


def find_parts(checkpoint: Checkpoint, records: Mapping[str, LayerRecord]) -> dict[str, StoredLayer]:
    """What a format has found in a checkpoint, by the names that its layers have in the model, those that it says.

    (Of checkpoints whose names are the model's already, those are theirs.)

    Raises:
        BitwrightError: BW304 if a layer has not the rows that its parts call for, BW306 if its rows cannot be told
            apart.
    """
    found: dict[str, StoredLayer] = {}
    for name, record in records.items():
        parts = checkpoint.parts.get(name)
        if parts is None:
            found[name] = StoredLayer(name, record, f"{name}.bias")
            continue
        _check_rows(checkpoint, name, record, parts)
        for part in parts:
            found[part.name] = StoredLayer(name, record, f"{part.name}.bias", part.rows)
    return found


def _check_rows(checkpoint: Checkpoint, name: str, record: LayerRecord, parts: tuple[Part, ...]) -> None:
    wanted, weight = sum(end - first for part in parts for first, end in part.rows), record.scheme.weight
    if wanted and record.shape[0] != wanted:
        what = f"{name} is of {record.shape[0]} rows; config.json calls for {wanted}"
        suggestion = "restore the config.json that belongs to the weights"
        raise BitwrightError("BW304", what, where=str(checkpoint.directory), suggestion=suggestion)
    if wanted and (weight.axis != 1 or weight.scale_scheme is not None):
        what = f"{name} holds queries, keys and values whose rows share scales ({weight.name})"
        suggestion = "quantize the original model with bitwright, which reads it in parts"
        raise BitwrightError("BW306", what, where=str(checkpoint.directory), suggestion=suggestion)


class PartReader:
    """Reads the quantized layers of a checkpoint.

    A layer of which the model has rows is unpacked once, if its parts are asked for one after the other, and let go of
    with the last of them.
    """

    def __init__(self, checkpoint: Checkpoint, layout: Format) -> None:
        self._checkpoint, self._layout = checkpoint, layout
        self._held: tuple[str, QuantizedTensor] | None = None
        self._left = 0  # how many parts of what is held have not been asked for

    def read(self, layer: StoredLayer) -> QuantizedTensor:
        """The numbers of a layer.

        Raises:
            BitwrightError: as the ``decode`` of the format.
        """
        if not layer.rows:
            return self._layout.decode(self._checkpoint, layer.name, layer.whole)
        if self._held is None or self._held[0] != layer.name:
            self._held = None  # before memory is taken for the next
            self._held = (layer.name, self._layout.decode(self._checkpoint, layer.name, layer.whole))
            self._left = len(self._checkpoint.parts[layer.name])
        part = _take_rows(self._held[1], layer.rows)
        self._left -= 1
        if not self._left:
            self._held = None
        return part


def _take_rows(whole: QuantizedTensor, rows: tuple[tuple[int, int], ...]) -> QuantizedTensor:
    def take(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[first:end] for first, end in rows])

    assert isinstance(whole.scale, Tensor)  # find_parts has seen to it
    zero = None if whole.zero is None else take(whole.zero)
    return replace(whole, codes=take(whole.codes), scale=take(whole.scale), zero=zero)
