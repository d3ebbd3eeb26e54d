"""Models whose weights stay on disk until they are needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from bitwright.models.blocks import find_blocks
from bitwright.models.location import resolve_model
from bitwright.quantization.sources import DiskSource

__all__ = ["BlockLoader", "attach_source", "detach_source", "load_empty_model", "source_of"]

ATTRIBUTE = "_bitwright_source"


def load_empty_model(pretrained_model_name_or_path: str | Path) -> nn.Module:
    """A causal language model without its weights: they are on the meta device, and are read when they are needed.

    ``pretrained_model_name_or_path`` is a directory with ``config.json`` and safetensors, or an id on the hub. With
    ``use_layer_wise=True`` the prepared model, run or converted, holds one block of float weights in memory at a time.

    Raises:
        BitwrightError: whatever is wrong with the directory.
    """
    return attach_source(resolve_model(pretrained_model_name_or_path))


def attach_source(directory: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The empty model of ``directory``, or ``model`` (of the same structure), with what reads its weights attached."""
    source = DiskSource(Path(directory))
    source.unify()
    if model is not None:
        source.model = model
    source.model.__dict__[ATTRIBUTE] = source
    return source.model


def source_of(model: nn.Module) -> DiskSource | None:
    """What reads the weights of an empty model; ``None`` for a model in memory."""
    found = model.__dict__.get(ATTRIBUTE)
    return found if isinstance(found, DiskSource) else None


def detach_source(model: nn.Module) -> None:
    """Let a model whose weights have been read be one like any other."""
    model.__dict__.pop(ATTRIBUTE, None)


class BlockLoader:
    """Brings each block's weights into memory when the model runs it, and lets them go when it has run."""

    def __init__(self, source: DiskSource) -> None:
        self.source = source
        blocks = find_blocks(source.model)
        names = {block: [name for name in source.shapes() if name.startswith(f"{block}.")] for block in blocks.names()}
        inside = {name for tensors in names.values() for name in tensors}
        source.load(name for name in source.shapes() if name not in inside)
        self.handles: list[Any] = []
        for block, module in zip(blocks.names(), blocks.modules, strict=True):
            self.handles.append(module.register_forward_pre_hook(self._load(names[block])))
            self.handles.append(module.register_forward_hook(self._release(names[block])))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def _load(self, names: list[str]) -> Any:
        return lambda module, inputs: self.source.load(names)

    def _release(self, names: list[str]) -> Any:
        return lambda module, inputs, output: self.source.release(names)
