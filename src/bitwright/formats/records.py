"""What a checkpoint format is, as data: a name and the functions that write it and read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme
from bitwright.formats.checkpoint import Checkpoint

__all__ = ["Format", "LayerRecord", "plain_scale"]


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """How one linear layer is stored: its scheme and its shape ``(out, in)``.

    ``reordered``: its groups are not runs of consecutive columns, and ``QuantizedTensor.group_index`` says what they
    are. Some formats must announce that in their configuration.

    Raises:
        ArgumentError: BW202 for reordered columns beside groups of activations.
    """

    scheme: LayerScheme
    shape: tuple[int, int]
    reordered: bool = False

    def __post_init__(self) -> None:
        self.scheme.check_order(reordered=self.reordered)


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


def plain_scale(
    name: str,
    tensor: QuantizedTensor,
    scheme: LayerScheme,
    *,
    title: str,
    reason: str | None,
    may_reorder: bool = False,
) -> Tensor:
    """The scale of a layer that a format without double quantization is about to store.

    ``reason`` is why it cannot, or ``None``; ``may_reorder``: whether it can say which columns make up a group.

    Raises:
        BitwrightError: BW205 if there is a reason, or the tensor is not of the scheme.
    """
    if tensor.scheme != scheme.weight:
        reason = f"its numbers are {tensor.scheme.name}, not {scheme.weight.name}"
    elif tensor.group_index is not None and not may_reorder:
        reason = "its groups are runs of consecutive columns"
    if reason is None and isinstance(tensor.scale, Tensor):
        return tensor.scale
    what = f"{name} cannot be stored as {title}: {reason}"
    raise BitwrightError("BW205", what, suggestion="--format native stores every scheme")
