"""What calibration says of an input site: one activation, and all the linears that read it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from bitwright.core.errors import BitwrightError

__all__ = ["NonFiniteActivations", "Observed", "SiteStatistics", "collect_statistics"]


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
    kept only where an algorithm asks for it.
    """

    width: int
    with_gram: bool = False
    tokens: int = 0
    sum_of_squares: Tensor = field(init=False)  # [in] float64
    sum_of_magnitudes: Tensor = field(init=False)  # [in] float64
    largest: Tensor = field(init=False)  # [in] float32
    gram: Tensor | None = field(init=False)

    def __post_init__(self) -> None:
        self.sum_of_squares = torch.zeros(self.width, dtype=torch.float64)
        self.sum_of_magnitudes = torch.zeros(self.width, dtype=torch.float64)
        self.largest = torch.zeros(self.width)
        self.gram = torch.zeros(self.width, self.width) if self.with_gram else None

    def add(self, activations: Tensor) -> None:
        """Count the tokens of ``activations`` (``[..., in]``, any float dtype)."""
        tokens = activations.detach().reshape(-1, self.width).to(torch.float32)
        magnitudes = tokens.abs()
        self.tokens += tokens.shape[0]
        self.sum_of_squares += tokens.square().sum(0, dtype=torch.float64)
        self.sum_of_magnitudes += magnitudes.sum(0, dtype=torch.float64)
        self.largest = torch.maximum(self.largest, magnitudes.amax(0))
        if self.gram is not None:
            self.gram.addmm_(tokens.T, tokens)  # float32: a bf16 running sum stalls at 8 bits


@dataclass(frozen=True, slots=True)
class Observed:
    """What a pass over the calibration samples told.

    Attributes:
        statistics: of each layer's input site; the layers of a site share one object. Layers that saw no token lack.
        sites: the layers that read the very same input, together, in the order in which they ran.
    """

    statistics: Mapping[str, SiteStatistics]
    sites: tuple[tuple[str, ...], ...]


def collect_statistics(
    linears: Mapping[str, nn.Module],
    forwards: Sequence[Callable[[], object]],
    *,
    with_gram: bool,
    numbers: Sequence[int] | None = None,
    sites: Sequence[Sequence[str]] | None = None,
) -> Observed:
    """Run each of ``forwards`` (one calibration sample each) and sum what the ``linears`` read.

    Linears that read the very same tensor when they first run form a site, unless ``sites`` says which ones do.
    ``numbers`` are those of the samples in the data set, for messages; their positions unless given.

    Raises:
        NonFiniteActivations: naming the sample and the layer whose input is not finite.
    """
    statistics: dict[str, SiteStatistics] = {}
    read: list[tuple[Tensor, str]] = []
    known = [[name for name in site if name in linears] for site in sites or ()]
    leaders = {name: site[0] for site in known for name in site}
    seen: dict[str, str] = {}  # the leaders of the layers that have run, in the order in which they did
    sample = 0

    def look(name: str, activations: Tensor) -> None:
        if name not in leaders:
            leaders[name] = next((other for tensor, other in read if tensor is activations), name)
            read.append((activations, leaders[name]))
        seen[name] = leaders[name]
        if leaders[name] != name:
            return
        if not torch.isfinite(activations).all():
            number = sample if numbers is None else numbers[sample]
            raise NonFiniteActivations(sample, number, f"at the input of {name}")
        if name not in statistics:
            statistics[name] = SiteStatistics(activations.shape[-1], with_gram)
        statistics[name].add(activations)

    hooks = [
        module.register_forward_pre_hook(lambda _, inputs, name=name: look(name, inputs[0]))
        for name, module in linears.items()
    ]
    try:
        for sample, forward in enumerate(forwards):  # noqa: B007 - `look` names the sample
            forward()
            read.clear()
    finally:
        for hook in hooks:
            hook.remove()
    members: dict[str, list[str]] = {}
    for name, leader in seen.items():
        members.setdefault(leader, []).append(name)
    found = {name: statistics[leader] for name, leader in seen.items() if leader in statistics}
    return Observed({name: entry for name, entry in found.items() if entry.tokens}, tuple(map(tuple, members.values())))
