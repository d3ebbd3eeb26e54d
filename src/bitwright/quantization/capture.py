"""Recording what a model hands to its blocks, so that each block can be run alone afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.core.errors import BitwrightError
from bitwright.models.blocks import Blocks, set_module
from bitwright.quantization.statistics import SiteStatistics, collect_statistics

__all__ = ["BlockCall", "Captured", "ChangedBetweenBlocks", "capture", "head_output", "observe_head", "run_block"]


@dataclass(frozen=True, slots=True)
class BlockCall:
    """How a model called a block, without the hidden states and without a cache: masks, positions and the like."""

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    hidden_keyword: str | None  # the name under which the hidden states came, or None for the first argument


@dataclass(frozen=True, slots=True)
class Captured:
    """``inputs``: the first block's hidden states, one tensor a sample; ``calls[block][sample]``; ``as_tuple``: whether
    blocks return tuples."""

    inputs: tuple[Tensor, ...]
    calls: tuple[tuple[BlockCall, ...], ...]
    as_tuple: bool


class _Feeder(nn.Module):
    """Stands in for a block: whatever comes in, hands on the hidden states that the block would have made."""

    def __init__(self, block: nn.Module, *, as_tuple: bool) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule, as in the recorder
        self.as_tuple, self.hidden = as_tuple, torch.empty(0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        return (self.hidden,) if self.as_tuple else self.hidden


class _Reached(Exception):
    """Ends a forward pass once everything wanted has been seen."""


class ChangedBetweenBlocks(BitwrightError):
    """BW313: a model does more than to hand what each block makes to the next one, or takes blocks in another order."""

    def __init__(self, what: str) -> None:
        super().__init__(
            "BW313",
            what,
            why="blocks are calibrated one at a time, each on the output of the one before; what the model does "
            "between them (an addition, an activation, another order, a state of its own) would be left out",
            suggestion="move that into the blocks, or quantize without calibration: --algorithm rtn or hqq",
        )


class _Recorder(nn.Module):
    """Stands in for a block: notes the call and passes the hidden states on unchanged.

    With ``before``, the recorder of the block before, it is ``checked`` that they arrive as that one passed them on.
    """

    def __init__(
        self, name: str, block: nn.Module, *, as_tuple: bool, is_last: bool, before: _Recorder | None = None
    ) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not a submodule: the model must not find its parameters twice
        self.__dict__["before"] = before
        self.name, self.as_tuple, self.is_last = name, as_tuple, is_last
        self.is_checked = False
        self.handed: tuple[Tensor, Tensor] | None = None  # what was passed on where that is checked, and a copy of it
        self.seen: list[tuple[Tensor, BlockCall]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["block"], name)  # models read attributes of their blocks, such as layer types

    def __getitem__(self, key: Any) -> Any:
        return self.__dict__["block"][key]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.__dict__["block"])

    def forward(self, *arguments: Any, **keywords: Any) -> Any:
        name = None if arguments else _hidden_keyword(keywords)
        hidden, rest = (arguments[0], arguments[1:]) if name is None else (keywords.pop(name, None), ())
        if not isinstance(hidden, Tensor):
            raise _no_tensor(self.__dict__["block"], hidden, "is given")
        hidden = self._checked(hidden, (*rest, *keywords.values())) if self.is_checked else hidden
        # A cache would be filled again by every run of the block, each attending to what the runs before it left.
        kept = {key: False if key == "use_cache" else _without_cache(value) for key, value in keywords.items()}
        self.seen.append((hidden, BlockCall(tuple(map(_without_cache, rest)), kept, name)))
        if self.is_last:
            raise _Reached
        handed = hidden
        if self.is_checked:  # other numbers than came in: so a block is told that is given the same as the one before
            handed = -hidden if hidden.is_floating_point() else hidden.clone()
            self.handed = handed, handed.clone()
        return (handed,) if self.as_tuple else handed

    def _checked(self, hidden: Tensor, others: Sequence[Any]) -> Tensor:
        """What the first block was given, if what the one before passed on has arrived here, and in one place."""
        before: _Recorder | None = self.__dict__["before"]
        if before is None and not self.seen:
            return hidden
        if before is None or self.seen or before.handed is None:
            raise ChangedBetweenBlocks(f"{self.name} is not given just what the block before it made")
        (passed, numbers), before.handed = before.handed, None
        if not _is_same(numbers, hidden) or any(other is passed for other in others):
            raise ChangedBetweenBlocks(f"{self.name} is not given just what the block before it made")
        return before.seen[-1][0]


def run_block(block: nn.Module, hidden: Tensor, call: BlockCall) -> Tensor:
    """The hidden states that ``block`` makes of ``hidden``: what it returns, or the first tensor in that.

    Raises:
        BitwrightError: BW313 if there is no tensor.
    """
    output = _call(block, hidden.clone(), call)  # a block may add to its input in place, and is run more than once
    values = list(output.values()) if isinstance(output, Mapping) else output
    several = values if isinstance(values, tuple | list) else [values]
    result = next((value for value in several if isinstance(value, Tensor)), None)
    if result is None:
        raise _no_tensor(block, output, "returns")
    return result


def _no_tensor(block: nn.Module, found: object, verb: str) -> BitwrightError:
    what = f"{type(block).__name__} {verb} a {type(found).__name__}, and no tensor of hidden states"
    return BitwrightError("BW313", what, suggestion="let its first argument, and what it returns, be a tensor")


@torch.no_grad()
def capture(model: nn.Module, blocks: Blocks, forwards: Sequence[Callable[[], object]]) -> Captured:
    """Run ``forwards`` (one calibration sample each) with every block replaced by a recorder.

    Everything before the blocks, and the first block, must be loaded; the others may be on the meta device.

    Raises:
        ChangedBetweenBlocks: if a block is not given just what the one before it made.
    """
    names = blocks.names()
    first = _Recorder(names[0], blocks.modules[0], as_tuple=False, is_last=True)
    _run_with(model, names[:1], [first], forwards[0])
    if not first.seen:
        raise ChangedBetweenBlocks(f"{names[0]} is not run as a whole, with its hidden states for an argument")
    hidden, call = first.seen[0]
    as_tuple = isinstance(_call(blocks.modules[0], hidden, call), tuple | list)
    recorders: list[_Recorder] = []
    for name, block in zip(names, blocks.modules, strict=True):
        before, is_last = recorders[-1] if recorders else None, len(recorders) == len(names) - 1
        recorders.append(_Recorder(name, block, as_tuple=as_tuple, is_last=is_last, before=before))
    for number, forward in enumerate(forwards):
        for recorder in recorders:
            recorder.is_checked = number == 0  # what a model does between blocks, it does to every sample
        try:
            _run_with(model, names, recorders, forward)
        except (IndexError, TypeError, ValueError) as error:  # which did not come up to the first block
            if number or not as_tuple:
                raise
            what = "the model takes more from its blocks than their hidden states"
            raise ChangedBetweenBlocks(what) from error
        missed = next((recorder.name for recorder in recorders if len(recorder.seen) != number + 1), None)
        if missed is not None:
            raise ChangedBetweenBlocks(f"{missed} is not run once for each sample")
    inputs = tuple(hidden.detach() for hidden, _ in recorders[0].seen)
    pool: list[BlockCall] = []
    calls = tuple(tuple(_intern(call, pool) for _, call in recorder.seen) for recorder in recorders)
    return Captured(inputs, calls, as_tuple)


@torch.no_grad()
def observe_head(
    model: nn.Module,
    blocks: Blocks,
    head: Mapping[str, nn.Module],
    forwards: Sequence[Callable[[], object]],
    hidden: Sequence[Tensor],
    *,
    as_tuple: bool,
    with_gram: bool,
    numbers: Sequence[int],
) -> Mapping[str, SiteStatistics]:
    """Statistics of what the output head reads, from the last block's outputs ``hidden``, one a sample.

    ``forwards`` run the whole model; its blocks are not computed, and the head is not either. Everything else must be
    loaded.
    """
    names, feeders = blocks.names(), [_Feeder(block, as_tuple=as_tuple) for block in blocks.modules]

    def forward(sample: int) -> None:
        for feeder in feeders:
            feeder.hidden = hidden[sample]
        _run_with(model, names, feeders, forwards[sample])

    runs = [partial(forward, sample) for sample in range(len(forwards))]
    try:
        for module in head.values():
            module.forward = _leave  # the statistics are taken before it; nobody needs the logits
        return collect_statistics(head, runs, with_gram=with_gram, numbers=numbers).statistics
    finally:
        for module in head.values():
            del module.forward


def head_output(
    model: nn.Module, blocks: Blocks, hidden: Tensor, forward: Callable[[], Tensor], *, as_tuple: bool
) -> Tensor:
    """What ``forward`` (of the whole model) returns if the last block's output is ``hidden``; no block is computed."""
    feeders = [_Feeder(block, as_tuple=as_tuple) for block in blocks.modules]
    found: list[Tensor] = []
    for feeder in feeders:
        feeder.hidden = hidden
    _run_with(model, blocks.names(), feeders, lambda: found.append(forward()))
    return found[0]


def _hidden_keyword(keywords: Mapping[str, Any]) -> str:
    """By what name a block that is called without positional arguments gets its hidden states."""
    floats = [key for key, value in keywords.items() if isinstance(value, Tensor) and value.is_floating_point()]
    return "hidden_states" if "hidden_states" in keywords or not floats else floats[0]


def _is_same(left: Tensor, right: Tensor) -> bool:
    """Whether two tensors are equal number by number; NaN is equal to itself, and is looked for elsewhere."""
    if left is right or left.shape != right.shape or left.dtype != right.dtype:
        return left is right
    right = right.to(left.device)
    return bool(torch.equal(left, right) or ((left == right) | (left.isnan() & right.isnan())).all())


def _leave(*_: object) -> None:
    raise _Reached


def _without_cache(value: Any) -> Any:
    """``None`` instead of a cache of keys and values, by whatever name or place it is handed on."""
    return None if hasattr(value, "get_seq_length") and hasattr(value, "update") else value


def _call(block: nn.Module, hidden: Tensor, call: BlockCall) -> object:
    if call.hidden_keyword is None:
        return block(hidden, *call.arguments, **call.keywords)
    return block(**{call.hidden_keyword: hidden}, **call.keywords)


def _run_with(
    model: nn.Module, names: Sequence[str], recorders: Sequence[nn.Module], forward: Callable[[], object]
) -> None:
    originals = [model.get_submodule(name) for name in names]
    try:
        for name, recorder in zip(names, recorders, strict=True):
            set_module(model, name, recorder)
        forward()
    except _Reached:
        pass
    finally:
        for name, original in zip(names, originals, strict=True):
            set_module(model, name, original)


def _intern(call: BlockCall, pool: list[BlockCall]) -> BlockCall:
    """Share equal calls: masks and positions of windows of one length are the same in every block and sample."""
    for known in pool:
        if _equal(known.arguments, call.arguments) and _equal(dict(known.keywords), dict(call.keywords)):
            return known
    pool.append(call)
    return call


def _equal(left: object, right: object) -> bool:
    if isinstance(left, Tensor) and isinstance(right, Tensor):
        return left is right or (left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right))
    if type(left) is not type(right):
        return False
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[key], right[key]) for key in left)
    if isinstance(left, tuple | list) and isinstance(right, tuple | list):
        return len(left) == len(right) and all(map(_equal, left, right))
    return left is right or bool(left == right)
