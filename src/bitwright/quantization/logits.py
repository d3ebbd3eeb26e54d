"""The finishing pass over a whole quantized model: what it predicts is drawn to what the float model predicts.

Codes stay as they are (or are learned as well); scales, float zero points, biases and norm weights move by Adam along
the gradient of KL(float || quantized) over the vocabulary. One block has gradients at a time: the inputs of all blocks
are kept, each block is run again on its own when the gradient of its output is known, and hands on that of its input.
Memory is then that of one block, of the activations of one batch, and of the numbers that move. Layers that quantize
their activations while running are tuned with float ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.models.blocks import Blocks, set_module
from bitwright.models.quantized import QuantizedLinear
from bitwright.quantization.capture import BlockCall, capture, head_output, run_block
from bitwright.quantization.fake_quant import CodeWeight
from bitwright.quantization.stages import Finisher, Stage
from bitwright.quantization.tuning import (
    FORWARD_AND_BACKWARD,
    Adam,
    TunedBlock,
    draw_batches,
    gradients_enabled,
    learning_rate,
)

__all__ = ["LOGITS", "LogitsOptions", "LogitsTask", "LogitsUpdates", "tune_logits"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsOptions:
    """How a whole model is tuned.

    Attributes:
        steps: of Adam; 0 changes nothing.
        batch: windows a step.
        lr: the largest step of a scale's multiplier, and of biases and norms in units of their root mean square.
        codes_up_to: learn the codes too, by rounding positions that move, where the blocks have at most so many
            weights; 0: never. It takes some twenty bytes of memory a weight.
        code_lr: the largest step of a position, in codes.
        code_wait: the part of the steps before the first position moves: what is not an integer is tuned alone then.
        warmup: the part of the steps in which the step size grows.
        held_back: the part of the windows that is never trained on: the best iterate is that of least divergence there.
        check_every: steps between two looks at the windows held back.
    """

    steps: int = 250
    batch: int = 8
    lr: float = 5e-3
    codes_up_to: int = 50_000_000
    code_lr: float = 0.01
    code_wait: float = 0.3
    warmup: float = 0.1
    held_back: float = 0.125
    check_every: int = 10

    def __post_init__(self) -> None:
        _check("steps", self.steps, self.steps >= 0, "a whole number of at least 0")
        _check("batch", self.batch, self.batch >= 1, "a whole number of at least 1")
        _check("lr", self.lr, 0 < self.lr < 1, "a number between 0 and 1")
        _check("codes_up_to", self.codes_up_to, self.codes_up_to >= 0, "a whole number of at least 0")
        _check("code_lr", self.code_lr, 0 < self.code_lr < 1, "a number between 0 and 1")
        _check("code_wait", self.code_wait, 0 <= self.code_wait < 1, "a number from 0 to below 1")
        _check("warmup", self.warmup, 0 <= self.warmup < 1, "a number from 0 to below 1")
        _check("held_back", self.held_back, 0 < self.held_back < 1, "a number between 0 and 1")
        _check("check_every", self.check_every, self.check_every >= 1, "a whole number of at least 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsTask:
    """A quantized model on the bench.

    Attributes:
        model: takes ``input_ids``, returns ``logits``; its parts outside the blocks are loaded.
        blocks: the name of the model's list of blocks (``model.layers``).
        windows: int64 ``[length]`` each, equally long.
        reference: the float model's logits ``[length, vocabulary]`` of a window, by its number in ``windows``.
        load_block: the block of a number with its ``QuantizedLinear`` layers, ready to run; ``None``: the model's own.
            It may be called many times for each block; what it returned before is no longer used then.
        float_weight: the float weight ``[out, in]`` of a layer by full name, to which moving codes are drawn at the
            start; ``None``: they start in the middle of their roundings.
        outer: what takes the place of modules outside the blocks, by full name, where the quantized model is run: the
            output head's, if that is quantized. Gradients pass through it.
    """

    model: nn.Module
    blocks: str
    windows: Sequence[Tensor]
    reference: Callable[[int], Tensor]
    load_block: Callable[[int], nn.Module] | None = None
    float_weight: Callable[[str], Tensor] | None = None
    outer: Mapping[str, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsUpdates:
    """``tensors``: of layers, ``vectors``: biases and norm weights, by full names; the divergence before and after, in
    nats a token on the windows held back."""

    tensors: Mapping[str, QuantizedTensor]
    vectors: Mapping[str, Tensor]
    before: float
    after: float


def tune_logits(
    task: LogitsTask,
    options: LogitsOptions,
    *,
    seed: int = 0,
    state: Mapping[str, Tensor] | None = None,
    on_check: Callable[[Mapping[str, Tensor], float], None] | None = None,
) -> LogitsUpdates | None:
    """Tune a quantized model towards the float model's predictions; the model itself stays as it is.

    The result is the best iterate on the windows held back, or ``None`` if nothing was better than the start. After
    each look at them ``on_check`` gets the whole state, a flat dict of tensors, and the divergence; a later call with
    that ``state`` and otherwise the same arguments goes on from there and ends with the same numbers.

    Raises:
        BitwrightError: BW401 for fewer than two windows, BW601 if the divergence is not finite.
    """
    if len(task.windows) < 2:
        what = "tuning by logits needs two windows at least, one to train on and one to judge by"
        raise BitwrightError("BW401", what, suggestion="--samples 2 or more, a longer text, or a smaller --seqlen")
    if options.steps == 0:
        return None
    with gradients_enabled():
        run = _Run(task, options, seed)
        try:
            return run.go(state, on_check)
        finally:
            run.close()


def _passes(options: LogitsOptions, samples: int) -> float:
    again = 1 + FORWARD_AND_BACKWARD  # each block runs a second time for its gradients
    judged = options.held_back * samples / options.check_every
    return options.steps * (again * min(options.batch, samples) + judged)


LOGITS: Stage[Finisher] = Stage("logits", LogitsOptions, tune_logits, passes=_passes)


class _Run:
    """One call of :func:`tune_logits`: ``values`` are the numbers that move, by full name."""

    def __init__(self, task: LogitsTask, options: LogitsOptions, seed: int) -> None:
        self.task, self.options = task, options
        self.names = [f"{task.blocks}.{number}" for number in range(len(_children(task)))]
        self.values: dict[str, Tensor] = {}
        self.best: dict[str, Tensor] = {}
        self.resident: dict[int, TunedBlock] = {}
        self.adam, self.generator = Adam(), torch.Generator().manual_seed(seed)
        held = max(1, round(options.held_back * len(task.windows)))
        order = torch.randperm(len(task.windows), generator=self.generator).tolist()
        self.judged, self.trained = sorted(order[:held]), sorted(order[held:])
        self.calls: dict[int, tuple[BlockCall, ...]] = {}
        self.inputs = self._enter_each()

    def go(
        self, state: Mapping[str, Tensor] | None, on_check: Callable[[Mapping[str, Tensor], float], None] | None
    ) -> LogitsUpdates | None:
        batches = draw_batches(self.trained, self.options.batch, self.generator)
        if state is None:
            start = least = self.judge()
            self.best = {name: value.clone() for name, value in self.values.items()}
        else:
            start, least = self._load(state)
        for step in range(self.options.steps):
            batch = next(batches)
            if step < self.adam.count:
                continue  # done before an interruption; the order of the samples is the same
            self.step(batch, self._rates(step))
            if (step + 1) % self.options.check_every and step + 1 < self.options.steps:
                continue
            divergence = self.judge()
            if divergence < least:
                least = divergence
                self.best = {name: value.clone() for name, value in self.values.items()}
            if on_check is not None:
                on_check(self._state(start, least), divergence)
        return self._updates(start, least) if least < start else None

    def _rates(self, step: int) -> dict[str, float]:
        options = self.options
        rate = learning_rate(step, options.steps, warmup=options.warmup)
        code_rate = learning_rate(step, options.steps, warmup=options.warmup, wait=options.code_wait)
        return {"": options.lr * rate, "position": options.code_lr * code_rate}

    def step(self, batch: Sequence[int], rates: Mapping[str, float]) -> None:
        """One step of Adam; each block moves as soon as its gradients are known."""
        calls = self._calls(len(batch))
        hidden, inputs = torch.cat([self.inputs[index] for index in batch]), []
        with torch.no_grad():
            for number in range(len(self.names)):
                inputs.append(hidden)
                with self._open(number) as block:
                    hidden = run_block(block.block, hidden, calls[number])
        top = hidden.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self._loss(top, batch), top)
        self.adam.begin()
        for number in reversed(range(len(self.names))):
            with self._open(number) as block:
                entering = inputs.pop().detach().requires_grad_(number > 0)
                torch.autograd.backward(run_block(block.block, entering, calls[number]), gradient)
                prefix = self.names[number] + "."
                gradients = {prefix + name: value for name, value in block.gradients().items()}
                self.adam.update(self.values, gradients, rates)
                block.refresh()
                gradient = gradient if entering.grad is None else entering.grad

    @torch.no_grad()
    def judge(self) -> float:
        """The mean divergence over the windows held back."""
        total = 0.0
        for start in range(0, len(self.judged), self.options.batch):
            batch = self.judged[start : start + self.options.batch]
            calls, hidden = self._calls(len(batch)), torch.cat([self.inputs[index] for index in batch])
            for number in range(len(self.names)):
                with self._open(number) as block:
                    hidden = run_block(block.block, hidden, calls[number])
            total += float(self._loss(hidden, batch)) * len(batch)
        if not total < float("inf"):
            what = "the divergence from the float model is not finite on calibration windows"
            raise BitwrightError("BW601", what, suggestion="a smaller learning rate (lr), or the algorithm without it")
        return total / len(self.judged)

    def close(self) -> None:
        for block in self.resident.values():
            block.release(keep_vectors=False)

    @contextmanager
    def _open(self, number: int) -> Iterator[TunedBlock]:
        """A block with stand-ins for its layers and the present values; only the model's own are kept for next time."""
        if number in self.resident:
            yield self.resident[number]
            return
        load = self.task.load_block
        module = _children(self.task)[number] if load is None else load(number)
        layers = {name: child for name, child in module.named_modules() if isinstance(child, QuantizedLinear)}
        weights = {name: self._weight(f"{self.names[number]}.{name}", layer) for name, layer in layers.items()}
        block = TunedBlock(module, layers, weights, _float_dtype(module, self.inputs[0].dtype))
        prefix = self.names[number] + "."
        known = {name: self.values[prefix + name] for name in block.values if prefix + name in self.values}
        if known:
            block.restore(known)
        self.values |= {prefix + name: value for name, value in block.values.items()}
        if load is None:
            self.resident[number] = block
        yield block

    def _weight(self, name: str, layer: QuantizedLinear) -> CodeWeight:
        look_up = self.task.float_weight
        weight = None if look_up is None or not self.moving else look_up(name)
        return CodeWeight(layer.unpack(), weight, moving=self.moving)

    def _enter_each(self) -> tuple[Tensor, ...]:
        """What enters the first block for each window. The size of that block settles whether codes move."""
        forwards = [partial(self._read, [window]) for window in range(len(self.task.windows))]
        with self._first_loaded() as blocks:
            captured = capture(self.task.model, blocks, forwards)
            layers = [child for child in blocks.modules[0].modules() if isinstance(child, QuantizedLinear)]
        weights = len(self.names) * sum(layer.in_features * layer.out_features for layer in layers)
        self.moving, self.as_tuple = 0 < weights <= self.options.codes_up_to, captured.as_tuple
        self.calls[1] = tuple(calls[0] for calls in captured.calls)
        return captured.inputs

    def _calls(self, size: int) -> tuple[BlockCall, ...]:
        """How each block is called for so many windows; they are equally long, so nothing else matters to that."""
        if size not in self.calls:
            with self._first_loaded() as blocks:
                captured = capture(self.task.model, blocks, [partial(self._read, range(size))])
            self.calls[size] = tuple(calls[0] for calls in captured.calls)
        return self.calls[size]

    @contextmanager
    def _first_loaded(self) -> Iterator[Blocks]:
        modules = _children(self.task)
        if self.task.load_block is None:
            yield Blocks(name=self.task.blocks, modules=modules)
            return
        first = self.task.load_block(0)
        set_module(self.task.model, self.names[0], first)
        try:
            yield Blocks(name=self.task.blocks, modules=(first, *modules[1:]))
        finally:
            set_module(self.task.model, self.names[0], modules[0])

    def _read(self, batch: Sequence[int]) -> Tensor:
        ids = torch.stack([self.task.windows[index] for index in batch])
        logits: Tensor = self.task.model(input_ids=ids, use_cache=False).logits
        return logits

    def _loss(self, hidden: Tensor, batch: Sequence[int]) -> Tensor:
        """The mean KL divergence (nats a token) of what the model makes of the last block's output."""
        blocks = Blocks(name=self.task.blocks, modules=_children(self.task))
        with _replaced(self.task.model, self.task.outer):
            logits = head_output(self.task.model, blocks, hidden, partial(self._read, batch), as_tuple=self.as_tuple)
        found = torch.log_softmax(logits.to(torch.float32), -1)
        wanted = torch.stack([self.task.reference(index) for index in batch]).to(torch.float32)
        sums = functional.kl_div(found, torch.log_softmax(wanted, -1), log_target=True, reduction="sum")
        return sums / (found.shape[0] * found.shape[1])

    def _state(self, start: float, least: float) -> dict[str, Tensor]:
        values = {f"value.{name}": value.clone() for name, value in self.values.items()}
        best = {f"best.{name}": value for name, value in self.best.items()}
        judged = torch.tensor([start, least], dtype=torch.float64)
        return {**self.adam.state(), **values, **best, "divergence": judged}

    def _load(self, state: Mapping[str, Tensor]) -> tuple[float, float]:
        self.adam.load(state)
        for name, value in state.items():
            kind, _, rest = name.partition(".")
            if kind in ("value", "best"):
                (self.values if kind == "value" else self.best)[rest] = value.clone()
        start, least = state["divergence"].tolist()
        return start, least

    def _updates(self, start: float, least: float) -> LogitsUpdates:
        tensors: dict[str, QuantizedTensor] = {}
        vectors: dict[str, Tensor] = {}
        for number, prefix in enumerate(self.names):
            with self._open(number) as block:
                block.restore({name: self.best[f"{prefix}.{name}"] for name in block.values})
                tensors |= {f"{prefix}.{name}": weight.tensor() for name, weight in block.weights.items()}
                vectors |= {f"{prefix}.{name}": vector for name, vector in block.changed_vectors().items()}
        return LogitsUpdates(tensors=tensors, vectors=vectors, before=start, after=least)


def _children(task: LogitsTask) -> tuple[nn.Module, ...]:
    return tuple(task.model.get_submodule(task.blocks).children())


@contextmanager
def _replaced(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    originals = {name: model.get_submodule(name) for name in modules}
    for name, module in modules.items():
        set_module(model, name, module)
    try:
        yield
    finally:
        for name, original in originals.items():
            set_module(model, name, original)


def _float_dtype(module: nn.Module, default: torch.dtype) -> torch.dtype:
    """The dtype in which a block computes: that of its norms and biases, else that of its inputs."""
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), default)


def _check(field: str, value: object, is_valid: bool, accepted: str) -> None:
    if not is_valid:
        raise ArgumentError("BW201", f"{field} is {value!r}", suggestion=accepted)
