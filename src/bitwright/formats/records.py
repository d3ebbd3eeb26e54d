"""What a checkpoint format is, as data: a name and the functions that write it and read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme
from bitwright.formats.checkpoint import Checkpoint

__all__ = ["Format", "LayerRecord"]


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """How one linear layer is stored: its scheme and its shape ``(out, in)``.

    ``reordered``: its groups are not runs of consecutive columns, and ``QuantizedTensor.group_index`` says what they
    are. Some formats must announce that in their configuration.
    """

    scheme: LayerScheme
    shape: tuple[int, int]
    reordered: bool = False


def _refuse_nothing(records: Mapping[str, LayerRecord], ignored: Sequence[str]) -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Format:
    """A way to lay quantized layers out in a checkpoint.

    Attributes:
        name: what ``--format`` calls it.
        refuse: why a layer of this scheme and shape cannot be stored, or ``None`` if it can.
        encode: the tensors of one layer, by their names in the file; all begin with the layer's name and a dot.
        config: the ``quantization_config`` of a checkpoint, from the records of its quantized layers and the names of
            the linear layers that stay float.
        recognize: whether a ``quantization_config`` is of this format (whatever its version).
        layers: the records of the quantized layers of a checkpoint.
        decode: one layer of a checkpoint, as the canonical tensor.
        refuse_together: why layers that can be stored one by one cannot be in one checkpoint (with these linear layers
            left float), or ``None`` if they can: some formats have one setting for all layers.
    """

    name: str
    refuse: Callable[[LayerScheme, tuple[int, int]], str | None]
    encode: Callable[[str, QuantizedTensor, LayerScheme], dict[str, Tensor]]
    config: Callable[[Mapping[str, LayerRecord], Sequence[str]], dict[str, Any]]
    recognize: Callable[[Mapping[str, Any]], bool]
    layers: Callable[[Checkpoint], dict[str, LayerRecord]]
    decode: Callable[[Checkpoint, str, LayerRecord], QuantizedTensor]
    refuse_together: Callable[[Mapping[str, LayerRecord], Sequence[str]], str | None] = _refuse_nothing
