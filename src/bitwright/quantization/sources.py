"""Where a model's weights come from: a directory of safetensors, read part by part, or a module in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import Checkpoint, list_names, open_checkpoint
from bitwright.formats.safetensors_file import TensorSource
from bitwright.models.blocks import find_blocks, output_head
from bitwright.models.hf import empty_model, read_config
from bitwright.models.names import match_names, shared_names, state_names
from bitwright.models.tying import untie_stored

__all__ = ["DiskSource", "MemorySource", "Source", "refuse_nonfinite"]

# The bits that are all ones in a NaN or an infinity, and the whole numbers to look at them through.
EXPONENTS = {
    torch.bfloat16: (np.uint16, np.uint16(0x7F80)),
    torch.float16: (np.uint16, np.uint16(0x7C00)),
    torch.float32: (np.uint32, np.uint32(0x7F800000)),
    torch.float64: (np.uint64, np.uint64(0x7FF0000000000000)),
}
SAMPLED = 1 << 20  # bytes of a file that are hashed in each of three places
PIECE = 1 << 18  # numbers looked at together, so that the copy stays in cache
MOVED = 1 << 24  # numbers fetched together from another device


class Source(Protocol):
    """A model whose tensors can be brought into memory and let go again, by module name."""

    model: nn.Module
    config: Mapping[str, Any]
    directory: Path | None

    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def unify(self) -> None: ...
    def load(self, names: Iterable[str]) -> None: ...
    def release(self, names: Iterable[str]) -> None: ...
    def read(self, name: str) -> Tensor: ...
    def assign(self, name: str, tensor: Tensor) -> None: ...
    def stored(self, name: str) -> Tensor | TensorSource: ...
    def identity(self) -> dict[str, Any]: ...
    def byte_count(self) -> int: ...


class DiskSource:
    """A local Hugging Face directory. The model starts on the meta device; nothing is read before it is asked for.

    Raises:
        BitwrightError: whatever is wrong with the directory, before any weight is read.
    """

    def __init__(self, directory: Path) -> None:
        checkpoint: Checkpoint = open_checkpoint(directory)
        if checkpoint.quantization is not None:
            method = checkpoint.quantization.get("quant_method", "unknown")
            raise BitwrightError(
                "BW201",
                f"{directory} is quantized already (quant_method {method!r})",
                why="rounding rounded weights again only adds error",
                suggestion="quantize the original model",
            )
        self.directory: Path | None = directory
        self.config: Mapping[str, Any] = checkpoint.config
        self.model: nn.Module = empty_model(read_config(checkpoint))
        self._checkpoint = checkpoint
        find_blocks(self.model)  # says what is not supported; names of such models may differ from the files', too
        if untie_stored(self.model, checkpoint, checkpoint.tensors):
            self.config = {**self.config, "tie_word_embeddings": False}
        self._files = match_names(self.model, checkpoint.tensors)
        self._shapes = state_names(self.model)
        self._shared = shared_names(self.model)
        self._dtype: torch.dtype | None = None  # of all float tensors that are loaded; as stored unless given
        self._check_shapes()
        self._check_dtypes()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def unify(self) -> None:
        """From now on load models of mixed float dtypes in float32, which holds all of them, so that they can run."""
        stored = {self.stored(name).dtype for name in self._shapes}
        self._dtype = torch.float32 if len({dtype for dtype in stored if dtype.is_floating_point}) > 1 else None

    def load(self, names: Iterable[str]) -> None:
        for name in names:
            self.assign(name, self.read(name))

    def release(self, names: Iterable[str]) -> None:
        for name in names:
            self.assign(name, torch.empty(self._shapes[name], device="meta"))

    def read(self, name: str) -> Tensor:
        """A tensor as :meth:`load` puts it into the model."""
        tensor = self._checkpoint.read(self._files[name])
        is_cast = self._dtype is not None and tensor.is_floating_point()
        return tensor.to(self._dtype) if is_cast else tensor

    def untie(self, name: str) -> None:
        """From now on ``name``, a second name of a parameter, is one of its own, with the same numbers at first."""
        first = self._shared.pop(name)
        self._shapes[name], self._files[name] = self._shapes[first], self._files[first]

    def assign(self, name: str, tensor: Tensor) -> None:
        """Put ``tensor`` where the parameter or buffer ``name`` is, and where it is tied to, as one parameter."""
        parameter = nn.Parameter(tensor, requires_grad=False)
        for target in [name, *(second for second, first in self._shared.items() if first == name)]:
            parent, _, leaf = target.rpartition(".")
            holder = self.model.get_submodule(parent)
            if leaf in holder._parameters:
                holder._parameters[leaf] = parameter
            else:
                holder._buffers[leaf] = tensor

    def stored(self, name: str) -> TensorSource:
        return self._checkpoint.source(self._files[name])

    def identity(self) -> dict[str, Any]:
        """What must not change between a run and its resumption: of each file its size, its time, and a hash.

        The hash is of the header's first MiB and of one MiB each from the middle and the end, not of the whole file:
        a change elsewhere that leaves size and time as they were goes unseen.
        """
        files = {}
        for file in sorted({stored.file for stored in self._checkpoint.tensors.values()}):
            path = self._checkpoint.directory / file
            status = path.stat()
            digest = hashlib.sha256()
            with path.open("rb") as opened:
                for start in (0, status.st_size // 2, max(0, status.st_size - SAMPLED)):
                    opened.seek(start)
                    digest.update(opened.read(SAMPLED))
            files[file] = [status.st_size, status.st_mtime_ns, digest.hexdigest()]
        return {"directory": str(self._checkpoint.directory.resolve()), "config": dict(self.config), "files": files}

    def byte_count(self) -> int:
        return sum(stored.entry.nbytes for stored in self._checkpoint.tensors.values())

    def _check_shapes(self) -> None:
        for name, shape in self._shapes.items():
            stored = tuple(self._checkpoint.tensors[self._files[name]].entry.shape)
            if stored != shape:
                raise BitwrightError(
                    "BW304",
                    f"tensor {self._files[name]} has shape {list(stored)}, but config.json calls for {list(shape)}",
                    where=str(self._checkpoint.directory),
                    suggestion="check hidden_size, intermediate_size, vocab_size and the head counts in config.json",
                )

    def _check_dtypes(self) -> None:
        for name, parameter in self.model.named_parameters():
            stored = self.stored(name).dtype if name in self._shapes else parameter.dtype
            if parameter.is_floating_point() and not stored.is_floating_point:
                raise BitwrightError(
                    "BW304",
                    f"tensor {self._files[name]} has dtype {str(stored).removeprefix('torch.')}; a float is called for",
                    where=str(self._checkpoint.directory),
                    suggestion="fetch the weights again; what these numbers stand for is not known",
                )


class MemorySource:
    """A module that is in memory already, on whatever device; loading and releasing do nothing.

    Raises:
        BitwrightError: BW303 if some of its tensors are on the meta device and so have no numbers.
    """

    def __init__(self, model: nn.Module) -> None:
        empty = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
        if empty:
            raise BitwrightError(
                "BW303",
                f"{len(empty)} tensors of the module are on the meta device: {list_names(empty)}",
                why="such tensors have shapes and no numbers",
                suggestion="load the whole model, without offloading any of it, or give its directory instead",
            )
        self.model = model
        self.directory: Path | None = None
        self._own: dict[str, Tensor] = {}  # the module's tensors that a copy stands in for, by name
        config = getattr(model, "config", None)
        self.config: Mapping[str, Any] = {}
        if config is not None and hasattr(config, "to_dict"):
            self.config = config.to_dict()
            if isinstance(dtype := getattr(model, "dtype", None), torch.dtype):
                # The configuration may still tell the dtype that the model was made with.
                self.config = {**self.config, "dtype": str(dtype).removeprefix("torch.")}
            if self.config.get("tie_word_embeddings") and output_head(model) is not None and not shared_names(model):
                self.config = {**self.config, "tie_word_embeddings": False}  # so it was loaded, from files with both

    def unify(self) -> None: ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return state_names(self.model)

    def load(self, names: Iterable[str]) -> None:
        for name in names:
            self.assign(name, self.read(name).clone())

    def assign(self, name: str, tensor: Tensor) -> None:
        """Let ``tensor`` stand in for the parameter or buffer ``name``, until it is released."""
        places = self._places(name)
        holder, leaf = places[0]
        if name not in self._own:
            present = holder._parameters.get(leaf, holder._buffers.get(leaf))
            assert present is not None
            self._own[name] = present
        is_parameter = isinstance(self._own[name], nn.Parameter)
        self._assign(places, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)

    def release(self, names: Iterable[str]) -> None:
        for name in names:
            if name in self._own:
                self._assign(self._places(name), self._own.pop(name))

    @staticmethod
    def _assign(places: list[tuple[nn.Module, str]], tensor: Tensor) -> None:
        """One object in all places, so that what is tied stays tied."""
        for holder, leaf in places:
            if isinstance(tensor, nn.Parameter):
                holder._parameters[leaf] = tensor
            else:
                holder._buffers[leaf] = tensor

    def _places(self, name: str) -> list[tuple[nn.Module, str]]:
        """Where the parameter or buffer ``name`` is, and where it is tied to."""
        names = [name, *(second for second, first in shared_names(self.model).items() if first == name)]
        pairs = (each.rpartition(".") for each in names)
        return [(self.model.get_submodule(parent), leaf) for parent, _, leaf in pairs]

    def read(self, name: str) -> Tensor:
        """The module's own tensor, which is not to be changed, also while another one stands in for it."""
        return self._own[name].detach() if name in self._own else self.stored(name)

    def stored(self, name: str) -> Tensor:
        tensor: Tensor = self.model.state_dict()[name]
        return tensor.contiguous()

    def identity(self) -> dict[str, Any]:
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            for piece in _pieces(tensor):
                digest.update(piece)
        return {"class": type(self.model).__name__, "sha256": digest.hexdigest()}

    def byte_count(self) -> int:
        shared = shared_names(self.model)
        tensors = self.model.state_dict().items()
        return sum(tensor.numel() * tensor.element_size() for name, tensor in tensors if name not in shared)


def refuse_nonfinite(source: Source) -> None:
    """Look through every float weight before the first is touched.

    Raises:
        BitwrightError: BW309 naming the tensors and how many of their numbers are not finite.
    """
    names = list(source.shapes())
    pool = ThreadPoolExecutor(max_workers=torch.get_num_threads())
    try:
        counts = list(pool.map(lambda name: _count_nonfinite(source.stored(name)), names))
    finally:
        pool.shutdown(cancel_futures=True)
    broken = {name: count for name, count in zip(names, counts, strict=True) if count}
    if broken:
        listed = ", ".join(f"{name} ({count})" for name, count in list(broken.items())[:5])
        raise BitwrightError(
            "BW309",
            f"{len(broken)} tensors hold NaN or infinity: {listed}",
            where=str(source.directory or "the model in memory"),
            suggestion="fetch the weights again; the model cannot be right as it is",
        )


def _count_nonfinite(stored: Tensor | TensorSource) -> int:
    """How many numbers of a float tensor are NaN or infinite; tensors of whole numbers have none."""
    if stored.dtype not in EXPONENTS:
        return 0
    integer, exponent = EXPONENTS[stored.dtype]
    count = 0
    for chunk in _pieces(stored) if isinstance(stored, Tensor) else stored.chunks():
        numbers = np.frombuffer(chunk, dtype=integer)
        for start in range(0, len(numbers), PIECE):
            exponents = numbers[start : start + PIECE] & exponent
            if exponents.max() == exponent:
                count += int(np.count_nonzero(exponents == exponent))
    return count


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, in order; of one on another device, a part at a time. (Flat: a scalar has no bytes.)"""
    flat = tensor.detach().reshape(-1)
    for piece in torch.split(flat, MOVED):
        yield piece.cpu().view(torch.uint8).numpy().data
