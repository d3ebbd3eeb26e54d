"""What calibration says of an input site: one activation, and all the linears that read it."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.core.errors import BitwrightError
from bitwright.quantization.hessian_products import GramSum

__all__ = ["NonFiniteActivations", "Observed", "SiteStatistics", "collect_statistics"]

TILE = 1 << 18  # numbers looked at a time, so that the float32 copies stay in cache
TILE_ROWS = 256


class _AllRead(Exception):
    """Ends a forward pass in which every layer has got its input."""


class NonFiniteActivations(BitwrightError):
    """BW601: a calibration sample, at ``position`` in the flow and ``number`` in its data set, made NaN or infinity."""

    def __init__(self, position: int, number: int, where: str) -> None:
        super().__init__(
            "BW601",
            f"calibration sample {number} makes NaN or infinity {where}",
            why="statistics of such numbers would spoil every weight that depends on them",
            suggestion="check the model on this text in float32, or leave such samples out: --on-nonfinite drop-sample",
        )
        self.position, self.number, self.place = position, number, where


@dataclass(slots=True)
class SiteStatistics:
    """Sums over calibration tokens of the activations ``x`` (``[tokens, in]``) of one input site.

    Sums, not means, so that the parts of a data set can be added. ``gram`` is ``sum(x xT)`` (``[in, in]`` float32),
    kept only where an algorithm asks for it (``with_gram``): bf16 activations are multiplied as they are, with float32
    sums, where the processor can, and all others in float32, unless ``gram_dtype`` says otherwise; see
    :mod:`bitwright.quantization.hessian_products` for how exact that is.

    ``factored`` is a place for one factorization of the gram, so that the layers of a site share it: whoever makes one
    keeps it here with a key of their own. Counting more tokens empties it.
    """

    width: int
    with_gram: bool = False
    gram_dtype: torch.dtype | None = None
    tokens: int = 0
    sum_of_squares: Tensor = field(init=False)  # [in] float64
    sum_of_magnitudes: Tensor = field(init=False)  # [in] float64
    largest: Tensor = field(init=False)  # [in] float32
    factored: tuple[Hashable, Any] | None = field(init=False, default=None)
    _gram: GramSum | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.sum_of_squares = torch.zeros(self.width, dtype=torch.float64)
        self.sum_of_magnitudes = torch.zeros(self.width, dtype=torch.float64)
        self.largest = torch.zeros(self.width, dtype=torch.float32)

    @property
    def gram(self) -> Tensor | None:
        """``sum(x xT)`` so far; not to be changed."""
        if not self.with_gram:
            return None
        if self._gram is None:
            return torch.zeros(self.width, self.width, dtype=torch.float32)
        return self._gram.symmetric()

    def upper_gram(self) -> Tensor:
        """The same, right on and above the diagonal alone, which is faster where that is enough; not to be changed."""
        assert self.with_gram and self._gram is not None
        return self._gram.upper()

    def add(self, activations: Tensor) -> None:
        """Count the tokens of ``activations`` (``[..., in]``, any float dtype)."""
        tokens = activations.detach().reshape(-1, self.width)
        if not tokens.shape[0]:
            return
        self.tokens += tokens.shape[0]
        self.factored = None
        if self.largest.device != tokens.device:  # the sums lie where the activations do
            self.sum_of_squares, self.sum_of_magnitudes, self.largest = (
                part.to(tokens.device) for part in (self.sum_of_squares, self.sum_of_magnitudes, self.largest)
            )
        rows = max(1, min(TILE_ROWS, TILE // self.width))
        for start in range(0, tokens.shape[0], rows):
            magnitudes = tokens[start : start + rows].to(torch.float32).abs()
            self.largest = torch.maximum(self.largest, magnitudes.amax(0))
            self.sum_of_magnitudes += magnitudes.sum(0)  # few rows: float32 is exact enough until here
            self.sum_of_squares += magnitudes.square_().sum(0)
        if self.with_gram:
            if self._gram is None:
                self._gram = GramSum(self.width, self.gram_dtype)
            self._gram.add(tokens)


@dataclass(frozen=True, slots=True)
class Observed:
    """What a pass over the calibration samples told.

    Attributes:
        statistics: of each layer's input site; the layers of a site share one object. Layers that saw no token lack.
        sites: the layers that read the very same input, together, in the order in which they ran.
    """

    statistics: Mapping[str, SiteStatistics]
    sites: tuple[tuple[str, ...], ...]


@dataclass(slots=True)
class _Reader:
    """Notes what layers read while forward passes run: ``sample`` is the one that runs now.

    ``leaders`` says by which layer the site of each is known; ``seen`` the same of those that have run, in that order.
    """

    with_gram: bool
    numbers: Sequence[int] | None
    leaders: dict[str, str]
    sample: int = 0
    statistics: dict[str, SiteStatistics] = field(default_factory=dict)
    seen: dict[str, str] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set)  # in this forward pass
    # In this forward pass, with its version then (what is changed in place is read anew), and whose site it is.
    read: list[tuple[Tensor, int, str]] = field(default_factory=list)

    def look(self, name: str, activations: Tensor) -> None:
        """Layer ``name`` reads ``activations``."""
        if name not in self.leaders:
            version = 0 if activations.is_inference() else activations._version
            same = (other for tensor, at, other in self.read if tensor is activations and at == version)
            self.leaders[name] = next(same, name)
            self.read.append((activations, version, self.leaders[name]))
        self.seen[name] = self.leaders[name]
        self.reached.add(name)
        if self.leaders[name] != name:
            return
        if name not in self.statistics:
            self.statistics[name] = SiteStatistics(activations.shape[-1], self.with_gram)
        self.statistics[name].add(activations)
        if not torch.isfinite(self.statistics[name].largest).all():
            number = self.sample if self.numbers is None else self.numbers[self.sample]
            raise NonFiniteActivations(self.sample, number, f"at the input of {name}")

    def next(self) -> None:
        """A forward pass is over."""
        self.sample += 1
        self.read.clear()
        self.reached.clear()

    def observed(self) -> Observed:
        members: dict[str, list[str]] = {}
        for name, leader in self.seen.items():
            members.setdefault(leader, []).append(name)
        found = {name: self.statistics[leader] for name, leader in self.seen.items() if leader in self.statistics}
        reached = {name: entry for name, entry in found.items() if entry.tokens}
        return Observed(reached, tuple(map(tuple, members.values())))


def collect_statistics(
    linears: Mapping[str, nn.Module],
    forwards: Sequence[Callable[[], object]],
    *,
    with_gram: bool,
    numbers: Sequence[int] | None = None,
    sites: Sequence[Sequence[str]] | None = None,
    complete: int | None = None,
) -> Observed:
    """Run each of ``forwards`` (one calibration sample each) and sum what the ``linears`` read.

    Linears that read the very same tensor when they first run form a site, unless ``sites`` says which ones do.
    ``numbers`` are those of the samples in the data set, for messages; their positions unless given. Only the first
    ``complete`` forwards (all unless given) need to reach their end: the others stop once every one of the ``linears``
    has got its input.

    Raises:
        NonFiniteActivations: naming the sample and the layer whose input is not finite.
    """
    known = [[name for name in site if name in linears] for site in sites or ()]
    reader = _Reader(with_gram, numbers, {name: site[0] for site in known for name in site})

    def look(name: str, activations: Tensor) -> None:
        reader.look(name, activations)
        if complete is not None and reader.sample >= complete and len(reader.reached) == len(linears):
            raise _AllRead

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: look(name, inputs[0]))
        for name, module in linears.items()
    ]
    try:
        for forward in forwards:
            with suppress(_AllRead):
                forward()
            reader.next()
    finally:
        for hook in hooks:
            hook.remove()
    return reader.observed()
