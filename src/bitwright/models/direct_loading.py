"""From the files of a model to the native decoder, without a model between: names, shapes, and packed weights.

What is read here, and what is refused, is what :mod:`bitwright.models.loading` reads and refuses; but nothing of
transformers is imported, no module is filled, and at no time is more in memory than the packed weights and one tensor.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from bitwright.core.errors import BitwrightError, Notice
from bitwright.core.scheme import LayerScheme
from bitwright.core.settings import read_cache_limit
from bitwright.formats.checkpoint import Checkpoint, open_checkpoint
from bitwright.formats.kept import make_room, note_use
from bitwright.formats.safetensors_file import DTYPES, read_tensor
from bitwright.kernels import native, native_library
from bitwright.kernels.arena import Arena
from bitwright.kernels.native_decoder import Dense
from bitwright.kernels.native_pages import MOST_DIMENSION
from bitwright.kernels.records import KernelSpec, PackedWeight
from bitwright.kernels.table import select
from bitwright.models.blocks import linear_shape
from bitwright.models.decoder import read_shape
from bitwright.models.decoder_weights import (
    EMBEDDING,
    HEAD,
    LAYERS,
    MOST_COLUMNS,
    DecoderWeights,
    Rows,
    exact,
    pack_decoder,
    pack_rows,
)
from bitwright.models.loading import FLOAT_DTYPES, Contents, match_contents, read_generation_settings, read_layer
from bitwright.models.loading import read_parameter as read_whole
from bitwright.models.packed_files import PACKED, identify, load_packed, packed_bytes, packed_path, save_packed
from bitwright.models.plain_config import read_plain
from bitwright.models.skeleton import Skeleton

__all__ = ["Direct", "FileSource", "open_direct"]


class Direct:
    """A model whose every tensor has been found, and whose weights can be packed.

    Attributes:
        model: its modules, without numbers; with the tokens that end a text.
    """

    def __init__(self, model: Skeleton, contents: Contents) -> None:
        self.model, self._contents = model, contents

    def pack(self, head: LayerScheme | None, kept: Path | None = None) -> DecoderWeights:
        """Its weights; see :func:`bitwright.models.decoder_weights.pack_decoder`.

        Args:
            kept: a directory in which packed weights are looked for, and put where there are none. A :class:`Notice`
                tells of what is put there, and of what cannot be.

        Raises:
            BitwrightError: what is wrong with the numbers in the files; BW201 if the head cannot be stored so, or the
                limit of what is kept is none.
        """
        checkpoint, name = self._contents.checkpoint, None if head is None else head.name
        identity = identify(checkpoint, name)
        if kept is None:
            return self._pack(head)
        path, limit = packed_path(kept, identity), read_cache_limit()
        found = load_packed(path, identity)
        if found is not None:
            note_use(path)
            return found
        weights = self._pack(head)
        # Files that were changed in between would be known by times that they had not when they were read.
        if identify(checkpoint, name) == identity:
            _keep(weights, path, identity, limit)
        return weights

    def _pack(self, head: LayerScheme | None) -> DecoderWeights:
        return pack_decoder(read_shape(self.model), FileSource(self.model, self._contents), head)


def _keep(weights: DecoderWeights, path: Path, identity: Mapping[str, Any], limit: int) -> None:
    """Write the file that was asked for, whatever its size; others make room for it within ``limit``."""
    removed = make_room(path.parent, PACKED, allowed=max(0, limit - packed_bytes(weights)), keep=path)
    try:
        size = save_packed(weights, path, identity)
    except BitwrightError as error:
        said = f"the packed weights are not kept: {error.what}"
    else:
        said = f"the packed weights are kept for the next start, {size / 1e6:.0f} MB in {path}"
    if removed:
        said += f"; {removed} that were used before are removed, for BITWRIGHT_CACHE_LIMIT is {limit / 1e9:.1f} GB"
    warnings.warn(Notice(said), stacklevel=4)


def open_direct(directory: Path) -> Direct | None:
    """The model in ``directory``, if it can be read so and the native decoder runs it.

    ``None`` says that another way must be tried, which also says what is wrong, if anything is.
    """
    if native_library.missing() is not None:
        return None
    try:
        checkpoint = open_checkpoint(directory)
        config = read_plain(checkpoint.config)
        if (
            config is None
            or config.num_hidden_layers > len(checkpoint.tensors)
            or config.hidden_act not in ("silu", "swish")
        ):
            return None
        if config.head_dim > MOST_DIMENSION or config.intermediate_size > MOST_COLUMNS:
            return None
        config.name_or_path = str(directory)
        model = Skeleton(config)
        contents = match_contents(model, checkpoint)
        fields = read_generation_settings(directory) or {}
        model.generation_config = SimpleNamespace(eos_token_id=fields.get("eos_token_id"))
        return Direct(model, contents) if _is_run_natively(model, contents) else None
    except BitwrightError:
        return None


def _is_run_natively(model: Skeleton, contents: Contents) -> bool:
    names = [f"model.layers.{number}.{path}" for number in range(len(model.model.layers)) for path in LAYERS.values()]
    for name in (*names, HEAD):
        if name in contents.layers:
            record = contents.layers[name].record
            spec = KernelSpec(scheme=record.scheme, shape=record.shape, device=torch.device("cpu"))
            if select(spec) is not native.KERNEL:
                return False
        elif linear_shape(model.get_submodule(name))[1] > MOST_COLUMNS:
            return False
    return True


class FileSource:
    """The weights of a checkpoint (a :class:`bitwright.models.decoder_weights.WeightSource`)."""

    def __init__(self, model: Skeleton, contents: Contents) -> None:
        self._model, self._contents, self.arena = model, contents, Arena()
        self._checkpoint: Checkpoint = contents.checkpoint

    @property
    def dtype(self) -> torch.dtype:
        return self._model.config.dtype

    def dense(self, name: str) -> Dense:
        if name not in self._contents.layers:
            weight = pack_rows(self._rows(f"{name}.weight"), None, self.arena)
            return Dense(weight=weight, bias=self.vector(f"{name}.bias"))
        layer = self._contents.layers[name]
        scheme, is_reordered = layer.whole.scheme, layer.record.reordered
        # Before anything is read: what stays would make holes among what goes.
        place = self.arena.room(0 if is_reordered else native.codes_bytes(scheme.weight, layer.record.shape))
        tensor, input_scale = read_layer(self._contents, name)
        packed = native.pack(tensor, scheme, lambda size: place if size == place.numel() else self.arena.room(size))
        del tensor
        tensors = {part: each if part == "codes" else self.arena.keep(each) for part, each in packed.tensors.items()}
        weight = PackedWeight(scheme=packed.scheme, shape=packed.shape, tensors=tensors)
        return Dense(weight=weight, bias=self.vector(f"{name}.bias"), input_scale=input_scale)

    def vector(self, name: str) -> Tensor | None:
        stored = self._contents.matched.get(name)
        if stored is None:
            return None
        return self.arena.keep(
            exact(read_whole(self._model, self._checkpoint, stored, self._model.get_parameter(name)))
        )

    def head_rows(self) -> Rows | None:
        return None if HEAD in self._contents.layers else self._rows(f"{HEAD}.weight")

    def embedding(self) -> Tensor:
        rows = self._rows(f"{EMBEDDING}.weight")
        return rows.read(0, rows.shape[0])

    def end_head(self, *, keep_embedding: bool) -> None:
        """Nothing is held."""

    def _rows(self, name: str) -> Rows:
        """A float weight, which is read from its file when it is asked for."""
        parameter = self._model.get_parameter(name)
        matched = self._contents.matched
        stored = matched[name if name in matched else f"{EMBEDDING}.weight"]  # a tied head has one name of its two
        place = self._checkpoint.stored(stored)
        entry, path = place.entry, self._checkpoint.directory / place.file
        if entry.shape != tuple(parameter.shape) or DTYPES.get(entry.dtype) not in (*FLOAT_DTYPES, torch.float64):
            read_whole(self._model, self._checkpoint, stored, parameter)  # which says what is wrong

        def read(first: int, end: int) -> Tensor:
            return read_tensor(path, entry.rows([(first, end)])).to(parameter.dtype)

        return Rows((entry.shape[0], entry.shape[1]), parameter.dtype, read)
