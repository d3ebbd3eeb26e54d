"""A model that is rotated while it is read: the source of runs whose algorithm begins with a rotation."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bitwright.models.rotation import Rotation, plan_rotation, rotate_model, untie_head
from bitwright.quantization.sources import DiskSource, MemorySource, Source
from bitwright.quantization.stages import Rotator, Stage

__all__ = ["ROTATION", "RotatedSource", "RotationOptions", "rotate_source"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RotationOptions:
    """What is rotated: the hidden states in any case.

    Attributes:
        heads: the values of each attention head, too.
    """

    heads: bool = True


def rotate_source(source: DiskSource | MemorySource, options: RotationOptions, seed: int) -> Source:
    """The source of the rotated model; of a module in memory, a rotated copy.

    Raises:
        BitwrightError: BW201 saying why the model cannot be rotated.
    """
    rotation = plan_rotation(source.model, source.read, seed=seed, heads=options.heads)
    if isinstance(source, DiskSource):
        return RotatedSource(source, rotation)
    model = copy.deepcopy(source.model)
    rotate_model(model, rotation)
    return MemorySource(model)


def _rotate_module(model: nn.Module, options: RotationOptions, seed: int) -> None:
    """Rotate a module in memory, in place."""
    rotate_model(model, plan_rotation(model, model.get_parameter, seed=seed, heads=options.heads))


ROTATION: Stage[Rotator] = Stage("rotation", RotationOptions, _rotate_module)


class RotatedSource:
    """A source whose tensors are rotated as they are loaded. They keep the dtype in which they are stored."""

    def __init__(self, original: DiskSource, rotation: Rotation) -> None:
        self.original, self.rotation = original, rotation
        self.model, self.directory = original.model, original.directory
        for name in rotation.untied:
            original.untie(name)
        untie_head(self.model, rotation)
        self.config: Mapping[str, Any] = dict(original.config)
        if rotation.untied:
            self.config = {**original.config, "tie_word_embeddings": False}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.original.shapes()

    def unify(self) -> None:
        self.original.unify()

    def load(self, names: Iterable[str]) -> None:
        for name in names:
            self.original.assign(name, self.read(name))

    def release(self, names: Iterable[str]) -> None:
        self.original.release(names)

    def read(self, name: str) -> Tensor:
        """The rotated tensor, as it is loaded."""
        return self.rotation.transform(name, self.original.read(name))

    def assign(self, name: str, tensor: Tensor) -> None:
        self.original.assign(name, tensor)

    def stored(self, name: str) -> Tensor:
        """The rotated tensor, as it is written."""
        return self.read(name).to(self.original.stored(name).dtype)

    def identity(self) -> dict[str, Any]:
        return self.original.identity()

    def byte_count(self) -> int:
        added = [self.original.stored(source) for source in self.rotation.untied.values()]
        return self.original.byte_count() + sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in added)
