"""One quantization run: its units in order, each journaled, and the checkpoint at the end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.core.memory import trim_memory
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.recipe import Recipe
from bitwright.formats.safetensors_file import TensorSource, read_tensor, serialize
from bitwright.formats.safetensors_index import read_index
from bitwright.formats.storage import write_file
from bitwright.models.blocks import set_module
from bitwright.models.names import shared_names
from bitwright.quantization.calibration import CalibrationTokens
from bitwright.quantization.capture import Captured, capture, observe_head
from bitwright.quantization.events import Event, EventSink, Stopped
from bitwright.quantization.finishing import Finish, block_shard
from bitwright.quantization.journal import Journal, UnitRecord
from bitwright.quantization.plan import FINISH, Plan, head_note
from bitwright.quantization.report import versions
from bitwright.quantization.rows import layer_error, layer_row
from bitwright.quantization.sources import Source
from bitwright.quantization.statistics import NonFiniteActivations, SiteStatistics
from bitwright.quantization.stream import BlockResult, BlockWork, Flow, block_seed, quantize_block, round_layers
from bitwright.quantization.units import Unit
from bitwright.quantization.writer import tensor_bytes

__all__ = ["Job", "fingerprint"]

WAITING_BYTES = 128 << 20  # of small units that may wait while a large one is written
CPU = torch.device("cpu")
REFERENCE = "reference."  # begins the names of the float model's hidden states in the work directory


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """A unit that is computed and waits to be written."""

    unit: str
    file: str
    tensors: Mapping[str, Tensor | TensorSource]
    rows: Mapping[str, Mapping[str, Any]]
    inputs: Mapping[str, Tensor] = field(default_factory=dict)
    output_error: float | None = None
    dropped: tuple[int, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of memory that it holds."""
        return sum(tensor.nbytes for tensor in self.tensors.values() if isinstance(tensor, Tensor))


@dataclass(slots=True, kw_only=True)
class Job:
    """A planned run on one output directory.

    ``source`` loads onto ``device``, where everything is computed; what is written comes from the CPU.

    In calibrated runs ``captured`` is what the model hands to its blocks, and ``inputs`` the next block's inputs by the
    number of their sample; ``references`` are the same in the float model, where an algorithm needs them; ``dropped``
    are the samples left out because they made NaN or infinity.
    """

    source: Source
    plan: Plan
    recipe: Recipe
    calibration: CalibrationTokens | None
    output: Path
    journal: Journal
    sink: EventSink
    should_stop: Callable[[], bool]
    drop_nonfinite: bool = False
    device: torch.device = CPU
    captured: Captured | None = None
    inputs: dict[int, Tensor] = field(default_factory=dict)
    references: dict[int, Tensor] = field(default_factory=dict)
    dropped: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    committed: float = 0.0

    def run(self) -> None:
        """Do every unit that the journal does not have; while one is computed, those before it are written.

        Raises:
            Stopped: after a unit, if ``should_stop`` says so.
            BitwrightError: whatever goes wrong; finished units stay.
        """
        done, total = len(self.journal.done), len(self.plan.unit_names)
        if done:
            saved = round(sum(record.seconds for record in self.journal.done), 1)
            message = f"found {done}/{total} units done and intact ({saved} s saved), resuming at unit {done + 1}"
            self.sink(Event("resume", message, {"done": done, "total": total, "saved_seconds": saved}))
        pending = any(unit.layers for unit in self.plan.units[done:]) or FINISH in self.plan.unit_names[done:]
        if self.calibration is not None and pending:
            self._start_flow()
        self._do_units(done, total)
        if self.plan.finish is not None and len(self.journal.done) < total:
            self._finish()

    def _do_units(self, done: int, total: int) -> None:
        with ThreadPoolExecutor(max_workers=1) as writer:
            waiting: deque[tuple[Future[None], int]] = deque()
            last: Future[None] | None = None
            for index in range(done, len(self.plan.units)):
                started = time.perf_counter()
                unit = self.plan.units[index]
                self.sink(Event("progress", f"{unit.name} ...", {"unit": unit.name, "at": index + 1, "total": total}))
                work = self._compute(index, unit)
                while waiting and (work.inputs or work.size + sum(size for _, size in waiting) > WAITING_BYTES):
                    waiting.popleft()[0].result()
                last = writer.submit(self._commit, index, work, started, last)
                waiting.append((last, work.size))
                if self.should_stop() and index + 1 < total:
                    last.result()
                    raise Stopped(index + 1, total)
            if last is not None:
                last.result()

    def _finish(self) -> None:
        assert self.calibration is not None
        Finish(
            source=self.source,
            plan=self.plan,
            seed=block_seed(self.recipe.seed, FINISH),
            output=self.output,
            journal=self.journal,
            sink=self.sink,
            windows=[self.calibration.windows[number] for number in self.inputs],
            references=tuple(self.references.values()),
            as_tuple=self.captured is not None and self.captured.as_tuple,
            should_stop=self.should_stop,
        ).run()

    def _compute(self, index: int, unit: Unit) -> _Work:
        file = block_shard(self.plan, index)
        if unit.is_block:
            return self._compute_block(unit, file)
        tensors: dict[str, Tensor | TensorSource] = {name: self.source.stored(name) for name in unit.tensors}
        rows: Mapping[str, Mapping[str, Any]] = {}
        if unit.layers:
            quantized = self._compute_head(unit)
            encoded, rows = self._encode(unit, *quantized)
            tensors = {name: tensor for name, tensor in tensors.items() if not _is_weight_of(name, unit.layers)}
            tensors.update(encoded)
        return _Work(unit=unit.name, file=file, tensors=tensors, rows=rows)

    def _compute_head(self, unit: Unit) -> tuple[dict[str, QuantizedTensor], dict[str, Mapping[str, Any]]]:
        """Quantize the output head, on what the calibration samples bring to it if there are any."""
        second_names = shared_names(self.source.model)
        outer = [name for other in self.plan.units if not other.is_block for name in other.tensors]
        weights = [second_names.get(f"{layer}.weight", f"{layer}.weight") for layer in unit.layers]
        names = list(dict.fromkeys([*outer, *weights])) if self.captured is not None else weights
        self.source.load(names)
        layers = {name: self.source.model.get_submodule(name) for name in unit.layers}
        statistics = self._observe_head(layers)
        rounded = round_layers(
            layers, unit.layers, self.plan.methods, statistics, is_calibrated=self.captured is not None
        )
        rows: dict[str, Mapping[str, Any]] = {}
        for name, made in rounded.items():
            row = layer_row(layers[name], made.tensor, unit.layers[name], statistics.get(name))
            rows[name] = {**row, **head_note(self.plan.methods[name]), **made.notes}
        self.source.release(names)
        return {name: made.tensor for name, made in rounded.items()}, rows

    def _observe_head(self, layers: Mapping[str, nn.Module]) -> Mapping[str, SiteStatistics]:
        """Statistics of what the head reads, behind the quantized blocks."""
        if self.captured is None or self.calibration is None:
            return {}
        with_gram = any(self.plan.methods[name].algorithm.with_gram for name in layers)
        windows = [self.calibration.windows[number].to(self.device) for number in self.inputs]
        forwards = [partial(_forward, self.source.model, window) for window in windows]
        hidden = tuple(self.inputs.values())
        return observe_head(
            self.source.model,
            self.plan.blocks,
            layers,
            forwards,
            hidden,
            as_tuple=self.captured.as_tuple,
            with_gram=with_gram,
            numbers=tuple(self.inputs),
        )

    def _compute_block(self, unit: Unit, file: str) -> _Work:
        already_dropped = len(self.dropped)
        result = self._quantize(unit)
        tensors: dict[str, Tensor | TensorSource] = dict(_float_tensors(self.source, unit))
        tensors.update({f"{name}.input_scale": scale.cpu() for name, scale in result.input_scales.items()})
        encoded, rows = self._encode(unit, result.tensors, result.rows)
        tensors.update(encoded)
        self.inputs = dict(zip(self.inputs, result.outputs, strict=True))
        if result.references is not None:
            self.references = dict(zip(self.inputs, result.references, strict=True))
        self.source.release(unit.tensors)
        return _Work(
            unit=unit.name,
            file=file,
            tensors=tensors,
            rows=rows,
            inputs=self._saved_inputs(),
            output_error=result.output_error,
            dropped=tuple(self.dropped[already_dropped:]),
        )

    def _saved_inputs(self) -> dict[str, Tensor]:
        """The next block's inputs as they are kept in the work directory, by name."""
        saved = {f"{number:06d}": tensor.cpu() for number, tensor in self.inputs.items()}
        return saved | {f"{REFERENCE}{number:06d}": tensor.cpu() for number, tensor in self.references.items()}

    def _quantize(self, unit: Unit) -> BlockResult:
        """Quantize a block, again without the sample that made NaN or infinity if that is allowed."""
        layers = {name: self.source.model.get_submodule(name) for name in unit.layers}
        while True:
            self.source.load(unit.tensors)
            try:
                return quantize_block(self._block_work(unit, layers))
            except NonFiniteActivations as error:
                if not self.drop_nonfinite or len(self.inputs) == 1:
                    raise
                del self.inputs[error.number]
                self.references.pop(error.number, None)
                self.dropped.append(error.number)
                self.sink(
                    Event("notice", f"calibration sample {error.number} is left out: NaN or infinity {error.place}")
                )
            finally:
                for name, layer in layers.items():
                    set_module(self.source.model, name, layer)

    def _block_work(self, unit: Unit, layers: Mapping[str, nn.Module]) -> BlockWork:
        flow = None
        if self.captured is not None:
            calls = tuple(tuple(self.captured.calls[block][n] for n in self.inputs) for block in unit.blocks)
            references = tuple(self.references.values()) if self.plan.with_float_flow else None
            flow = Flow(tuple(self.inputs.values()), calls, tuple(self.inputs), references)
        return BlockWork(
            name=unit.name,
            model=self.source.model,
            blocks=tuple(self.plan.blocks.modules[block] for block in unit.blocks),
            layers=layers,
            schemes=unit.layers,
            methods=self.plan.methods,
            flow=flow,
            seed=self.recipe.seed,
            swap=flow is not None,
        )

    def _encode(
        self, unit: Unit, tensors: Mapping[str, QuantizedTensor], rows: Mapping[str, Mapping[str, Any]]
    ) -> tuple[dict[str, Tensor], dict[str, Mapping[str, Any]]]:
        """The tensors of the file, and the report's rows with the bits that those really take."""
        encoded: dict[str, Tensor] = {}
        measured: dict[str, Mapping[str, Any]] = {}
        for name, tensor in tensors.items():
            parts = self.plan.format.encode(name, tensor.to(CPU), unit.layers[name])
            bits = 8 * sum(map(tensor_bytes, parts.values()))
            measured[name] = {**rows[name], "bits_per_weight": round(bits / tensor.codes.numel(), 4)}
            encoded |= parts
        return encoded, measured

    def _commit(self, index: int, work: _Work, started: float, before: Future[None] | None) -> None:
        """Write a unit's files, then its line in the journal, unless what was to be written ``before`` it failed."""
        if before is not None:
            before.result()
        started = max(started, self.committed)
        # The head changes nothing in what the pass at the end begins with.
        saved = self.journal.done[-1].inputs if self.plan.finish is not None and self.journal.done else None
        if work.inputs:
            name = f"inputs-{index + 1:05d}.safetensors"
            saved = (name, write_file(self.journal.work / name, serialize(work.inputs)))
        record = UnitRecord(
            unit=work.unit,
            file=work.file,
            sha256=write_file(self.output / work.file, serialize(work.tensors)),
            tensors={name: tensor_bytes(tensor) for name, tensor in work.tensors.items()},
            layers=work.rows,
            inputs=saved,
            output_error=work.output_error,
            dropped=work.dropped,
            seconds=round(time.perf_counter() - started, 3),
        )
        self.journal.append(record)
        self.committed = time.perf_counter()
        trim_memory()
        self._tell(index, record, self.committed - started)

    def _start_flow(self) -> None:
        """Record how the model calls its blocks, and find the inputs of the first block still to do."""
        assert self.calibration is not None
        before = [name for unit in self.plan.units if not unit.is_block for name in unit.tensors]
        first = next(unit for unit in self.plan.units if unit.is_block)
        self.sink(
            Event("progress", f"running {len(self.calibration.windows)} calibration samples up to the first block")
        )
        self.source.unify()
        self.source.load([*before, *first.tensors])
        base = getattr(self.source.model, getattr(self.source.model, "base_model_prefix", ""), self.source.model)
        forwards = [partial(_forward, base, window) for window in self.calibration.windows.to(self.device)]
        self.captured = capture(self.source.model, self.plan.blocks, forwards)
        self.source.release([*before, *first.tensors])
        self.inputs = dict(enumerate(self.captured.inputs))
        self.references = dict(self.inputs) if self.plan.with_float_flow else {}
        self.dropped = [number for record in self.journal.done for number in record.dropped]
        saved = self.journal.done[-1].inputs if self.journal.done else None
        if saved is not None:
            tensors = _open_inputs(self.journal.work / saved[0], self.device)
            self.inputs = {int(name): tensors[name] for name in tensors if name.isdigit()}
            self.references = {
                int(name.removeprefix(REFERENCE)): tensors[name] for name in tensors if name.startswith(REFERENCE)
            }

    def _tell(self, index: int, record: UnitRecord, seconds: float) -> None:
        if record.layers:  # what holds none is done at once, and says nothing of the others
            self.seconds.append(seconds)
        remaining = len(self.plan.unit_names) - index - 1
        mean = sum(self.seconds) / len(self.seconds) if self.seconds else None
        eta = 0.0 if not remaining else None if mean is None else round(remaining * mean, 1)
        errors = [layer_error(row) for row in record.layers.values()]
        data = {
            "unit": record.unit,
            "done": index + 1,
            "total": len(self.plan.unit_names),
            "seconds": round(seconds, 3),
            "eta_seconds": eta,
            "error": max(errors) if errors else None,
            "output_error": record.output_error,
        }
        worst = f", worst weight error {max(errors):.4f}" if errors else ""
        self.sink(Event("unit", f"{record.unit} done{worst}", data))


def fingerprint(
    source: Source, plan: Plan, recipe: Recipe, calibration: CalibrationTokens | None, device: torch.device = CPU
) -> dict[str, Any]:
    """What a resumed run must have in common with the run that it resumes."""
    return {
        "model": source.identity(),
        "recipe": recipe.to_dict(),
        "schemes": {name: scheme.name for name, scheme in plan.schemes.items()},
        "algorithms": {name: method.name for name, method in plan.methods.items() if method.name != recipe.algorithm},
        "format": plan.format.name,
        "calibration": None if calibration is None else calibration.fingerprint(),
        "threads": torch.get_num_threads(),
        **({} if device.type == "cpu" else {"device": device.type}),
        "versions": versions(),
    }


def _open_inputs(path: Path, device: torch.device) -> dict[str, Tensor]:
    """A block's inputs from the work directory, by name, in the order of the samples."""
    index = read_index(path)
    return {name: read_tensor(path, index.tensors[name]).to(device) for name in sorted(index.tensors)}


def _forward(base: nn.Module, window: Tensor) -> object:
    return base(input_ids=window.unsqueeze(0), use_cache=False)


def _is_weight_of(name: str, layers: Mapping[str, Any]) -> bool:
    return name.endswith(".weight") and name.removesuffix(".weight") in layers


def _float_tensors(source: Source, unit: Unit) -> dict[str, Tensor]:
    """The unit's tensors that stay float, as they are in the module now: equalizing may have changed them.

    They keep the dtype in which they are stored.
    """
    tensors = {}
    for name in unit.tensors:
        if not _is_weight_of(name, unit.layers):
            parent, _, leaf = name.rpartition(".")
            holder = source.model.get_submodule(parent)
            tensor = holder._parameters.get(leaf, holder._buffers.get(leaf))
            assert tensor is not None
            tensors[name] = tensor.detach().to(CPU, source.stored(name).dtype).contiguous()
    return tensors
