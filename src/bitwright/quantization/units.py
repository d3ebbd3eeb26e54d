"""The steps of a run, each of which is one shard of the output: what lies outside the blocks, the blocks, the head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from bitwright.core.scheme import LayerScheme
from bitwright.models.blocks import Blocks
from bitwright.quantization.sources import Source

__all__ = ["Unit", "make_units"]

OUTER, HEAD = "outer", "head"  # names of the units that are not blocks


@dataclass(frozen=True, slots=True, kw_only=True)
class Unit:
    """One step of the run and one shard of the output.

    Attributes:
        name: of a block, or ``outer`` (embeddings, norms, a head left alone) or ``head`` (a quantized output head).
        tensors: all tensors of the float model that belong to it, by name.
        layers: the layers among them that are quantized, with their schemes.
        blocks: the numbers of the blocks in it: one, or several that are tuned together, or none.
    """

    name: str
    tensors: tuple[str, ...]
    layers: Mapping[str, LayerScheme]
    blocks: tuple[int, ...] = ()

    @property
    def is_block(self) -> bool:
        return bool(self.blocks)


def make_units(
    source: Source, blocks: Blocks, schemes: Mapping[str, LayerScheme], head: str | None, together: int
) -> tuple[Unit, ...]:
    """The shards in order: what is outside the blocks, ``together`` blocks at a time, a quantized head."""
    groups = [
        tuple(range(len(blocks.modules)))[start : start + together] for start in range(0, len(blocks.modules), together)
    ]
    names = {_group_name(blocks, group): group for group in groups}
    members: dict[str, list[str]] = {OUTER: [], **{name: [] for name in names}, HEAD: []}
    owner = {blocks.names()[number]: name for name, group in names.items() for number in group}
    for tensor in source.shapes():
        block = next((owner[name] for name in _prefixes(tensor) if name in owner), None)
        is_head = head is not None and tensor.startswith(head + ".")
        members[HEAD if is_head else block or OUTER].append(tensor)
    units = []
    for name, tensors in members.items():
        inside = [f"{blocks.names()[number]}." for number in names.get(name, ())]
        is_member = partial(_is_member, inside=inside, is_head_unit=name == HEAD, head=head)
        layers = {layer: scheme for layer, scheme in schemes.items() if is_member(layer)}
        if tensors or layers:
            units.append(Unit(name=name, tensors=tuple(tensors), layers=layers, blocks=names.get(name, ())))
    return tuple(units)


def _group_name(blocks: Blocks, group: tuple[int, ...]) -> str:
    """``model.layers.3``, or ``model.layers.2-3`` of blocks that are worked on together."""
    first = blocks.names()[group[0]]
    return first if len(group) == 1 else f"{first}-{group[-1]}"


def _is_member(layer: str, *, inside: Sequence[str], is_head_unit: bool, head: str | None) -> bool:
    """Whether a quantized layer belongs to a unit; the model may have modules named as units are."""
    if is_head_unit:
        return layer == head
    return layer != head and any(layer.startswith(prefix) for prefix in inside)


def _prefixes(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts))]
