"""What a model carries between being prepared and being converted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

from torch import Tensor, nn

from bitwright.compat.neural_compressor.torch.empty_model import BlockLoader, detach_source
from bitwright.compat.neural_compressor.torch.quantization.autoround_config import AutoRoundConfig
from bitwright.compat.neural_compressor.torch.quantization.composition import ComposedConfig
from bitwright.compat.neural_compressor.torch.quantization.conversion import Assignment, Batch, as_one_block, assign
from bitwright.compat.neural_compressor.torch.quantization.teq_training import ScaleTraining
from bitwright.core.errors import Notice
from bitwright.quantization.capture import ChangedBetweenBlocks

__all__ = ["Preparation", "preparation_of"]

ATTRIBUTE = "_bitwright_preparation"
Result = TypeVar("Result")


@dataclass(eq=False)
class Preparation:
    """The configuration of a prepared model, and every batch that it was run on; the model itself stays what it is."""

    config: ComposedConfig
    batches: list[Batch] = field(default_factory=list)
    is_recording: bool = True
    handle: Any = None
    loader: BlockLoader | None = None  # of a model whose weights are on disk
    training: ScaleTraining | None = None  # of TEQ's scales
    is_one_block: bool = False  # of a model whose blocks do not simply follow each other

    def assign(self, model: nn.Module) -> Assignment:
        """Which configuration each layer of the prepared ``model`` has."""
        assignment = assign(model, self.config)
        return as_one_block(model, assignment) if self.is_one_block else assignment

    def in_blocks(self, model: nn.Module, work: Callable[[Assignment], Result]) -> Result:
        """The result of ``work``, which is tried again with the model as one block where it cannot be cut into blocks.

        Raises:
            BitwrightError: BW313 if its blocks do not simply follow each other, and are loaded one at a time.
        """
        try:
            return work(self.assign(model))
        except ChangedBetweenBlocks as error:
            if self.is_one_block or self.loader is not None:
                raise
            self.is_one_block = True
            warnings.warn(Notice(f"{error.what}: the model is quantized as a single block"), stacklevel=4)
            return work(self.assign(model))

    def attach(self, model: nn.Module) -> None:
        """Note the arguments of every call of ``model`` from now on."""
        model.__dict__[ATTRIBUTE] = self
        self.handle = model.register_forward_pre_hook(self.record, with_kwargs=True)

    def detach(self, model: nn.Module) -> None:
        self.handle.remove()
        detach_source(model)
        del model.__dict__[ATTRIBUTE]

    @contextmanager
    def converting(self) -> Iterator[None]:
        """While this lasts, calls are not noted, and blocks are loaded by whoever works on them."""
        self.is_recording = False
        if self.loader is not None:
            self.loader.remove()
        try:
            yield
        except BaseException:
            self.is_recording = True
            if self.loader is not None:
                self.loader = BlockLoader(self.loader.source)
            raise

    def record(self, _: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not self.is_recording or (self.training is not None and self.training.has_begun):
            return
        caches = {name for name, value in keywords.items() if hasattr(value, "get_seq_length")}
        if any(int(keywords[name].get_seq_length()) for name in caches):
            return  # a later token of a text whose beginning was noted; alone it would say something else
        self.batches.append((arguments, {name: keywords[name] for name in keywords if name not in caches}))

    def samples(self) -> list[Batch]:
        """The batches, as many and as long as the configuration of AutoRound, if there is one, takes."""
        for member in self.config.members:
            if isinstance(member.config, AutoRoundConfig):
                return _limited(self.batches, member.config.n_samples, member.config.seqlen)
        return self.batches


def preparation_of(model: nn.Module) -> Preparation | None:
    found = model.__dict__.get(ATTRIBUTE)
    return found if isinstance(found, Preparation) else None


def _limited(batches: Sequence[Batch], samples: int, length: int) -> list[Batch]:
    """The first ``samples`` rows of all batches together, each of at most ``length`` tokens."""
    kept: list[Batch] = []
    for arguments, keywords in batches:
        tokens = next((value for value in (*arguments, *keywords.values()) if _is_tokens(value)), None)
        if tokens is None:
            kept.append((arguments, keywords))  # no batch of tokens: the model decides what it is
            continue
        if samples <= 0:
            break
        shape = tokens.shape

        def cut(value: Any, shape: Any = shape, rows: int = samples) -> Any:
            is_long = isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == shape[1]
            return value[:rows, :length] if is_long and value.shape[0] in (1, shape[0]) else value

        kept.append((tuple(map(cut, arguments)), {name: cut(value) for name, value in keywords.items()}))
        samples -= shape[0]
    return kept


def _is_tokens(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()
