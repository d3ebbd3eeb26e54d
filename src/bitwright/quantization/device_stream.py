"""Blocks brought to a GPU one after the other: while one is worked on, the next is read and copied there.

The weights of a block are read by a thread of its own into pinned memory, from which a second stream copies them while
the first computes. At most two blocks' weights are on the device: the one at work, and the one that is coming.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from bitwright.core.errors import ArgumentError
from bitwright.formats.safetensors_file import TensorSource
from bitwright.quantization.sources import Source

__all__ = ["Copies", "CudaLane", "DeviceSource", "Lane", "find_device", "on_device"]


@dataclass(frozen=True, slots=True)
class Copies:
    """Tensors on their way: ``tensors`` on the device, by name; ``done``: an event of the stream that copies, or
    ``None`` where copying waits."""

    tensors: Mapping[str, Tensor]
    done: Any = None


class Lane(Protocol):
    """A way to a device."""

    device: torch.device

    def begin(self, tensors: Mapping[str, Tensor]) -> Copies:
        """Begin to copy tensors of the CPU; from any thread."""
        ...

    def finish(self, copies: Copies) -> Mapping[str, Tensor]:
        """The tensors, which the work of the calling thread may use from now on."""
        ...


class CudaLane:
    """Copies from pinned memory on a stream of its own, beside the one that computes."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def begin(self, tensors: Mapping[str, Tensor]) -> Copies:
        # What is pinned here stays so until its copy is over: torch sees to that.
        pinned = {
            name: tensor.contiguous().pin_memory() if tensor.device.type == "cpu" else tensor
            for name, tensor in tensors.items()
        }
        with torch.cuda.stream(self._stream):  # a module that is there already is not to be changed: copied, too
            moved = {name: tensor.to(self.device, non_blocking=True, copy=True) for name, tensor in pinned.items()}
            return Copies(moved, self._stream.record_event())

    def finish(self, copies: Copies) -> Mapping[str, Tensor]:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(copies.done)
        for tensor in copies.tensors.values():
            tensor.record_stream(current)  # or its memory would be given to the next copy while it is read
        return copies.tensors


def find_device(name: str | torch.device) -> torch.device:
    """The device that a run computes on.

    Raises:
        ArgumentError: BW201 if there is none of that name here.
    """
    try:
        device = torch.device(name)
    except (RuntimeError, TypeError):
        raise ArgumentError("BW201", f"device is {name!r}", suggestion="accepted: cpu, cuda, cuda:0 ...") from None
    if device.type not in ("cpu", "cuda"):
        raise ArgumentError("BW201", f"device is {str(device)!r}", suggestion="accepted: cpu, cuda, cuda:0 ...")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            why = f"{count} usable GPUs are present" if count else "no usable GPU is present"
            raise ArgumentError("BW201", f"device is {str(device)!r}", why=why, suggestion="device='cpu'")
    return device


class DeviceSource:
    """A source whose tensors are loaded onto the device of ``lane``.

    Args:
        original: where the tensors come from.
        lane: the way to the device.
        order: the groups of names that will be asked for one after the other. When one is loaded, the next is begun.
    """

    def __init__(self, original: Source, lane: Lane, order: Sequence[Sequence[str]]) -> None:
        self.original, self.lane = original, lane
        self.model: nn.Module = original.model
        self.config: Mapping[str, Any] = original.config
        self.directory: Path | None = original.directory
        groups = [tuple(names) for names in order]
        self._next = dict(pairwise(groups))
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bitwright-ahead")
        self._ahead: tuple[tuple[str, ...], Future[Copies]] | None = None

    def load(self, names: Iterable[str]) -> None:
        """Put tensors into the model, on the device, and begin with those that are asked for next."""
        wanted = tuple(names)
        for name, tensor in self.lane.finish(self._take(wanted)).items():
            self.original.assign(name, tensor)
        following = self._next.get(wanted)
        if following is not None and (self._ahead is None or self._ahead[0] != following):
            self._drop()
            self._ahead = following, self._reader.submit(self._begin, following)

    def close(self) -> None:
        """Wait for what is on its way, and let it go."""
        self._drop()
        self._reader.shutdown()

    def _take(self, names: tuple[str, ...]) -> Copies:
        if self._ahead is not None and self._ahead[0] == names:
            ahead, self._ahead = self._ahead[1], None
            return ahead.result()
        return self._begin(names)

    def _begin(self, names: tuple[str, ...]) -> Copies:
        return self.lane.begin({name: self.original.read(name) for name in names})

    def _drop(self) -> None:
        if self._ahead is not None:
            self._ahead[1].exception()  # whatever went wrong will go wrong again when it is asked for
            self._ahead = None

    def release(self, names: Iterable[str]) -> None:
        self.original.release(names)

    def read(self, name: str) -> Tensor:
        return self.original.read(name)

    def assign(self, name: str, tensor: Tensor) -> None:
        self.original.assign(name, tensor)

    def stored(self, name: str) -> Tensor | TensorSource:
        return self.original.stored(name)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self.original.shapes()

    def unify(self) -> None:
        self.original.unify()

    def identity(self) -> dict[str, Any]:
        return self.original.identity()

    def byte_count(self) -> int:
        return self.original.byte_count()


@contextmanager
def on_device(source: Source, lane: Lane, order: Sequence[Sequence[str]]) -> Iterator[DeviceSource]:
    """``source`` by way of ``lane``. Buffers that no file has, such as frequencies, are on the device meanwhile."""
    moved = DeviceSource(source, lane, order)
    places = _computed_buffers(source)
    try:
        for holder, leaf, buffer in places:
            holder._buffers[leaf] = buffer.to(lane.device)
        yield moved
    finally:
        for holder, leaf, buffer in places:
            holder._buffers[leaf] = buffer
        moved.close()


def _computed_buffers(source: Source) -> list[tuple[nn.Module, str, Tensor]]:
    """Buffers that are not among the source's tensors: their modules, names there, and numbers."""
    stored = source.shapes()
    return [
        (module, leaf, buffer)
        for prefix, module in source.model.named_modules()
        for leaf, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta and f"{prefix}.{leaf}".removeprefix(".") not in stored
    ]
