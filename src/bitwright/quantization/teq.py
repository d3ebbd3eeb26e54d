"""TEQ: scales like AWQ's, but trained (Cheng et al. 2023).

One vector for each site, first ones, is trained by gradient descent on the squared error of the block's output with
weights rounded in their true schemes. The weights themselves are frozen.
"""

from __future__ import annotations

import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.core.errors import ArgumentError, Notice
from bitwright.core.grid import FitOptions
from bitwright.core.scheme import QuantScheme
from bitwright.models.sites import Site
from bitwright.quantization.smoothing import Range, apply_scale, judged_samples, refuse_options, task_sites
from bitwright.quantization.stages import BlockTask, Equalizer, Stage
from bitwright.quantization.teq_module import LEAST, TrainableSites, insert_scales
from bitwright.quantization.tuning import FORWARD_AND_BACKWARD

__all__ = ["TEQ", "TeqOptions", "TrainedScales", "scale_by_training", "train_scales"]

CHECKS = 10  # how often, in a whole training, an iterate is judged where a step sees only some of the samples
LENGTHS = (1.0, 3.0, 0.3, 8.0, 5.0, 12.0)  # of a step, in the order in which they are tried; the longest last
LENGTHS_TRIED = 2  # of them, in an ordinary step


@dataclass(frozen=True, slots=True, kw_only=True)
class TeqOptions:
    """How scales are trained.

    Attributes:
        steps: of Adam; with 0 the result is that of rounding to nearest.
        lr: the highest learning rate, reached after the warm-up; it then falls linearly to nothing.
        warmup: the share of the steps in which the learning rate rises.
        batch: how many calibration samples a step sees.
        folding: train only where the scale can be folded into the layer before. Otherwise a site without such a layer
            keeps a vector by which its input is multiplied while the model runs.
        range: where the rounder that follows puts the largest weight (see ``rtn``).
        search: whether that rounder tries shrunk ranges.
    """

    steps: int = 100
    lr: float = 1e-3
    warmup: float = 0.05
    batch: int = 8
    folding: bool = True
    range: Range = "restricted"
    search: bool = False

    def __post_init__(self) -> None:
        if self.range not in typing.get_args(Range):
            raise ArgumentError("BW201", f"range is {self.range!r}", suggestion=", ".join(typing.get_args(Range)))
        if type(self.steps) is not int or self.steps < 0:
            raise ArgumentError("BW201", f"steps is {self.steps!r}", suggestion="a whole number from 0")
        if type(self.batch) is not int or self.batch < 1:
            raise ArgumentError("BW201", f"batch is {self.batch!r}", suggestion="a whole number from 1")
        if not 0 < self.lr < 1:
            raise ArgumentError("BW201", f"lr is {self.lr!r}", suggestion="a number between 0 and 1")
        if not 0 <= self.warmup < 1:
            raise ArgumentError("BW201", f"warmup is {self.warmup!r}", suggestion="a number from 0 to below 1")

    @property
    def fit(self) -> FitOptions:
        return FitOptions(symmetric_range=self.range, search=self.search)


@dataclass(frozen=True, slots=True)
class TrainedScales:
    """``scales``: of each site, ``[in]`` float32; ``losses``: of each step, before it was taken, and of the best."""

    sites: tuple[Site, ...]
    scales: tuple[Tensor, ...]
    losses: tuple[float, ...]
    best: float


def scale_by_training(task: BlockTask, options: TeqOptions) -> Mapping[str, Tensor]:
    """Equalize a block in place with trained scales.

    Returns what could not be folded: by layer, the float32 vector ``[in]`` that multiplies its input at run time.

    Raises:
        BitwrightError: BW201 for a range that a layer's scheme cannot take.
    """
    trained = train_scales(task, options)
    multipliers: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for site, scale in zip(trained.sites, trained.scales, strict=True):
            if not bool((scale == 1).all()):
                multipliers |= apply_scale(task, site, scale, folding=options.folding, hooks=hooks) or {}
    return multipliers


def train_scales(task: BlockTask, options: TeqOptions) -> TrainedScales:
    """Train the scales of a block's sites; the block is left as it was. The best iterate is kept, ones included.

    Where a step sees all samples, each iterate is judged by its own loss; otherwise ``CHECKS`` of them are, on samples
    that stay the same.
    """
    refuse_options(task, options.fit)
    sites = _trained_sites(task, options)
    if not options.steps or not sites:
        ones = tuple(torch.ones(site.width, dtype=torch.float32) for site in sites)
        return TrainedScales(sites, ones, (), float("nan"))
    with torch.no_grad():
        targets = [task.run(sample) for sample in range(len(task.inputs))]
    with _frozen(task), torch.enable_grad():
        module = insert_scales(task.block, task.name, task.layers, task.linears, sites, options.fit)
        try:
            return _Training(task, options, module, targets).run()
        finally:
            module.remove()


class _Training:
    """One block's training: what it works on, and the best scales so far."""

    def __init__(self, task: BlockTask, options: TeqOptions, module: TrainableSites, targets: Sequence[Tensor]) -> None:
        self.task, self.options, self.module, self.targets = task, options, module, targets
        self.is_full = len(targets) <= options.batch
        longest = max(each.numel() // each.shape[-1] for each in targets)
        self.judged = judged_samples(task, min(len(targets), options.batch) * longest)
        self.best, self.kept = float("inf"), module.values()
        self.losses: list[float] = []
        self.rounded: dict[str, dict[str, Tensor]] = {}  # the layers' parameters at the present scales, once known

    def run(self) -> TrainedScales:
        optimizer = torch.optim.Adam(self.module.parameters(), lr=self.options.lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        generator = torch.Generator().manual_seed(self.task.seed)
        every = max(1, self.options.steps // CHECKS)
        for step in range(self.options.steps):
            if not self.is_full and step % every == 0:
                self._keep(self._judge(self.judged))
            optimizer.zero_grad()
            samples = self._batch(generator)
            loss = self._descend(samples)
            if self.is_full:
                self._keep(loss)
            self.losses.append(loss)
            before = [alpha.detach().clone() for alpha in self.module.parameters()]
            optimizer.step()
            schedule.step()
            self._search_line(before, loss, samples)
        self._keep(self._judge(self.judged))
        return TrainedScales(tuple(s for s, _ in self.module.scales), self.kept, tuple(self.losses), self.best)

    @torch.no_grad()
    def _search_line(self, before: Sequence[Tensor], loss: float, samples: Sequence[int]) -> None:
        """Go the first of several lengths of the step that has just been taken which lowers the loss.

        The loss jumps wherever a weight goes to its next code, so that a short step along the gradient often raises it
        by chance. Where all lengths do, the longest leads out of a place that is low by chance; the best is kept.
        """
        alphas = self.module.parameters()
        steps = [alpha - start for alpha, start in zip(alphas, before, strict=True)]
        for length in LENGTHS:
            for alpha, start, step in zip(alphas, before, steps, strict=True):
                alpha.copy_((start + length * step).clamp(min=LEAST))
            self.rounded = {}
            if self._judge(samples) < loss:
                return

    def _rate(self, step: int) -> float:
        """Linear warm-up, then linear decay to nothing."""
        rising = max(1, round(self.options.warmup * self.options.steps))
        return min((step + 1) / rising, (self.options.steps - step) / max(1, self.options.steps - rising), 1.0)

    def _batch(self, generator: torch.Generator) -> Sequence[int]:
        count = len(self.targets)
        if self.is_full:
            return range(count)
        return torch.randperm(count, generator=generator)[: self.options.batch].tolist()

    def _descend(self, samples: Sequence[int]) -> float:
        """Gradients of the mean loss of ``samples``. Weights are rounded once for all of them."""
        known = self._round()
        rounded = {path: layer.rounded(known[path]) for path, layer in self.module.scaled.items()}
        leaves = []
        for path, layer in self.module.scaled.items():
            held = {key: value.detach().requires_grad_(value.requires_grad) for key, value in rounded[path].items()}
            layer.prepared = held
            leaves += [(rounded[path][key], value) for key, value in held.items() if value.requires_grad]
        total = 0.0
        try:
            for sample in samples:
                loss = self._loss(sample) / len(samples)
                torch.autograd.backward([loss])
                total += float(loss.detach())
        finally:
            for layer in self.module.scaled.values():
                layer.prepared = None
        reached = [(made, leaf.grad) for made, leaf in leaves if leaf.grad is not None]
        if reached:
            torch.autograd.backward([made for made, _ in reached], [gradient for _, gradient in reached])
        return total

    @torch.no_grad()
    def _judge(self, samples: Sequence[int]) -> float:
        """The mean loss of ``samples`` with the scales as they are."""
        for path, parameters in self._round().items():
            self.module.scaled[path].prepared = parameters
        try:
            return sum(float(self._loss(sample)) / len(samples) for sample in samples)
        finally:
            for layer in self.module.scaled.values():
                layer.prepared = None

    @torch.no_grad()
    def _round(self) -> Mapping[str, dict[str, Tensor]]:
        """The parameters of each layer with the scales as they are, worked out once."""
        if not self.rounded:
            self.rounded = {path: layer.rounded() for path, layer in self.module.scaled.items()}
        return self.rounded

    def _loss(self, sample: int) -> Tensor:
        output, target = self.task.run_on(self.task.inputs[sample], sample), self.targets[sample]
        return (output.to(torch.float32) - target.to(torch.float32)).square().mean()

    def _keep(self, loss: float) -> None:
        if loss < self.best:
            self.best, self.kept = loss, self.module.values()


def _trained_sites(task: BlockTask, options: TeqOptions) -> tuple[Site, ...]:
    sites = []
    for site in task_sites(task):
        if site.fold is None and options.folding:
            warnings.warn(Notice(f"not equalized, since only folds are allowed: {site.refusal}"), stacklevel=2)
        else:
            sites.append(site)
    return tuple(sites)


@contextmanager
def _frozen(task: BlockTask) -> Iterator[None]:
    """No parameter of the block is trained but the scales."""
    kept = [(parameter, parameter.requires_grad) for parameter in task.block.parameters()]
    try:
        for parameter, _ in kept:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter, wanted in kept:
            parameter.requires_grad_(wanted)


def _passes(options: TeqOptions, samples: int) -> float:
    return (FORWARD_AND_BACKWARD + LENGTHS_TRIED) * options.steps * min(options.batch, samples)


def _refuse(scheme: QuantScheme, options: TeqOptions) -> str | None:
    return options.fit.refuse(scheme)


TEQ: Stage[Equalizer] = Stage("teq", TeqOptions, scale_by_training, _refuse, _passes)
