"""The last pass of a run, over the whole quantized model, for algorithms that have one.

The blocks' shards of such a run lie in the work directory at first. The pass leaves there what it changed, as the
tensors of one file; then each block's shard is put together anew in the output directory. All of it is journaled.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from bitwright.core.memory import trim_memory
from bitwright.formats.checkpoint import WORK_DIRECTORY, Checkpoint, StoredTensor
from bitwright.formats.safetensors_file import TensorSource, open_source, read_tensor, serialize
from bitwright.formats.safetensors_index import read_index
from bitwright.formats.storage import write_file
from bitwright.models.blocks import linear_weight, set_module
from bitwright.models.quantized import QuantizedLinear
from bitwright.quantization.capture import head_output
from bitwright.quantization.decoded import DecodedLinear
from bitwright.quantization.events import Event, EventSink, Stopped
from bitwright.quantization.journal import Journal, UnitRecord
from bitwright.quantization.logits import LogitsTask, LogitsUpdates
from bitwright.quantization.plan import FINISH, Plan
from bitwright.quantization.sources import Source
from bitwright.quantization.writer import shard_name, tensor_bytes

__all__ = ["Finish", "block_shard", "final_records"]

STATE = "finish-state.safetensors"  # where the pass stands, replaced after each look at its result
UPDATES = "finish-updates.safetensors"
RESIDENT_BYTES = 1 << 30  # float models up to this size are tuned with all blocks in memory, others one at a time


def block_shard(plan: Plan, index: int) -> str:
    """Where unit ``index`` is written first, relative to the output directory."""
    name = shard_name(index, len(plan.units))
    return f"{WORK_DIRECTORY}/{name}" if plan.finish is not None and plan.units[index].is_block else name


def final_records(plan: Plan, done: Sequence[UnitRecord]) -> list[UnitRecord]:
    """The records of the shards that make the checkpoint, in the order of the plan's units."""
    records = {record.unit: record for record in done}
    if plan.finish is None:
        return [records[unit.name] for unit in plan.units]
    final = []
    for unit in plan.units:
        before = records[unit.name]
        after = records[f"{FINISH}:{unit.name}"] if unit.is_block else before
        # The block's error is the one that was measured when it was rounded.
        final.append(replace(after, unit=unit.name, output_error=before.output_error, dropped=before.dropped))
    return final


@dataclass(frozen=True, slots=True, kw_only=True)
class Finish:
    """The pass of one run.

    ``windows``: the calibration windows (``[length]`` ids) that are left; ``references``: for each, what the float
    model's last block made of it. ``as_tuple``: whether blocks return tuples.
    """

    source: Source
    plan: Plan
    seed: int
    output: Path
    journal: Journal
    sink: EventSink
    windows: Sequence[Tensor]
    references: Sequence[Tensor]
    as_tuple: bool
    should_stop: Callable[[], bool]

    def run(self) -> None:
        """Do what the journal does not have yet of the pass.

        Raises:
            Stopped: after a step of it, or a look at its result, if ``should_stop`` says so.
        """
        names = self.plan.unit_names
        for index in range(len(self.journal.done), len(names)):
            started = time.perf_counter()
            place = {"unit": names[index], "at": index + 1, "total": len(names)}
            self.sink(Event("progress", f"{names[index]} ...", place))
            record = self._tune() if names[index] == FINISH else self._write_block(names[index])
            self.journal.append(replace(record, seconds=round(time.perf_counter() - started, 3)))
            trim_memory()
            if self.should_stop() and index + 1 < len(names):
                raise Stopped(index + 1, len(names))

    def _tune(self) -> UnitRecord:
        assert self.plan.finish is not None
        stage, options = self.plan.finish
        outer = [name for unit in self.plan.units if not unit.is_block for name in unit.tensors]
        self.source.load(outer)
        checkpoint = self._rounded()
        load_block = partial(self._load_block, checkpoint)
        blocks = self.plan.blocks
        originals = [self.source.model.get_submodule(name) for name in blocks.names()]
        is_resident = self.plan.source_bytes <= RESIDENT_BYTES
        try:
            if is_resident:
                for number, name in enumerate(blocks.names()):
                    set_module(self.source.model, name, load_block(number))
            task = LogitsTask(
                model=self.source.model,
                blocks=blocks.name,
                windows=self.windows,
                reference=self._reference,
                load_block=None if is_resident else load_block,
                float_weight=None if self.plan.is_equalized else self._float_weight,
                outer=self._quantized_head(checkpoint),
            )
            updates = stage.run(task, options, seed=self.seed, state=self._saved_state(), on_check=self._save_state)
        finally:
            for name, original in zip(blocks.names(), originals, strict=True):
                set_module(self.source.model, name, original)
        self.source.release(outer)
        tensors = self._encoded(updates)
        path = self.journal.work / UPDATES
        sizes = {name: tensor_bytes(tensor) for name, tensor in tensors.items()}
        file = f"{WORK_DIRECTORY}/{UPDATES}"
        return UnitRecord(unit=FINISH, file=file, sha256=write_file(path, serialize(tensors)), tensors=sizes)

    def _encoded(self, updates: LogitsUpdates | None) -> dict[str, Tensor]:
        """What changed, as tensors of the checkpoint."""
        if updates is None:
            self.sink(Event("notice", "the last pass found nothing better than what rounding had made"))
            return {}
        message = (
            f"divergence from the float model on windows held back: {updates.before:.5f} -> {updates.after:.5f} nats"
        )
        self.sink(Event("notice", message))
        tensors = {}
        for name, vector in updates.vectors.items():
            tensors[name] = vector.to(self.source.stored(name).dtype).contiguous()
        for name, tensor in updates.tensors.items():
            tensors |= self.plan.format.encode(name, tensor, self.plan.schemes[name])
        return tensors

    def _write_block(self, step: str) -> UnitRecord:
        """A block's shard: as it was rounded, with what the pass changed."""
        number = next(n for n, unit in enumerate(self.plan.units) if f"{FINISH}:{unit.name}" == step)
        rounded = self.output / block_shard(self.plan, number)
        path = self.journal.work / UPDATES
        changes = read_index(path).tensors
        tensors: dict[str, Tensor | TensorSource] = {}
        for name, entry in read_index(rounded).tensors.items():
            tensors[name] = open_source(path, changes[name]) if name in changes else open_source(rounded, entry)
        file = shard_name(number, len(self.plan.units))
        before = next(record for record in self.journal.done if record.unit == self.plan.units[number].name)
        return UnitRecord(
            unit=step,
            file=file,
            sha256=write_file(self.output / file, serialize(tensors)),
            tensors={name: tensor_bytes(tensor) for name, tensor in tensors.items()},
            layers={name: {**row, "finished": True} if changes else row for name, row in before.layers.items()},
        )

    def _rounded(self) -> Checkpoint:
        """The units as they were rounded, to be read tensor by tensor."""
        tensors: dict[str, StoredTensor] = {}
        for index in range(len(self.plan.units)):
            file = block_shard(self.plan, index)
            entries = read_index(self.output / file).tensors
            tensors |= {name: StoredTensor(file, entry) for name, entry in entries.items()}
        config = {"quantization_config": self.plan.format.config(self.plan.records, ())}
        return Checkpoint(self.output, config, tensors, {}, {})

    def _load_block(self, checkpoint: Checkpoint, number: int) -> nn.Module:
        """Block ``number`` with its quantized layers, from the work directory."""
        prefix = self.plan.blocks.names()[number] + "."
        block = copy.deepcopy(self.plan.blocks.modules[number])
        for name in self.plan.records:
            if name.startswith(prefix):
                set_module(block, name.removeprefix(prefix), self._quantized(checkpoint, name))
        for name, holder, leaf in _float_places(block):
            stored = _read_if_there(checkpoint, prefix + name)
            if stored is not None and leaf in holder._parameters:
                holder._parameters[leaf] = nn.Parameter(stored, requires_grad=False)
            elif stored is not None:
                holder._buffers[leaf] = stored
        return block

    def _quantized_head(self, checkpoint: Checkpoint) -> dict[str, nn.Module]:
        """What the finished model has in place of its float head, if that is quantized, to be run and not tuned."""
        names = [layer for unit in self.plan.units if not unit.is_block for layer in unit.layers]
        dtype = self.references[0].dtype
        return {name: DecodedLinear(self._quantized(checkpoint, name), dtype) for name in names}

    def _quantized(self, checkpoint: Checkpoint, name: str) -> QuantizedLinear:
        record = self.plan.records[name]
        tensor = self.plan.format.decode(checkpoint, name, record)
        bias, scale = (_read_if_there(checkpoint, f"{name}.{part}") for part in ("bias", "input_scale"))
        return QuantizedLinear.build(tensor, bias, record.scheme, scale)

    def _reference(self, number: int) -> Tensor:
        """The float model's logits (``[length, vocabulary]``) of a window."""
        ids = self.windows[number].unsqueeze(0)
        model = self.source.model
        logits = head_output(
            model, self.plan.blocks, self.references[number], lambda: model(input_ids=ids, use_cache=False).logits,
            as_tuple=self.as_tuple,
        )  # fmt: skip
        return logits[0]

    def _float_weight(self, layer: str) -> Tensor:
        """The float weight ``[out, in]`` of a layer; its block is put back into the model for as long as that takes."""
        blocks = self.plan.blocks
        place, original = next(
            (name, block)
            for name, block in zip(blocks.names(), blocks.modules, strict=True)
            if layer.startswith(name + ".")
        )
        present, name = self.source.model.get_submodule(place), f"{layer}.weight"
        set_module(self.source.model, place, original)
        try:
            self.source.load([name])
            weight = linear_weight(original.get_submodule(layer.removeprefix(place + "."))).detach().clone()
            self.source.release([name])
        finally:
            set_module(self.source.model, place, present)
        return weight

    def _saved_state(self) -> dict[str, Tensor] | None:
        path = self.journal.work / STATE
        if not path.is_file():
            return None
        return {name: read_tensor(path, entry) for name, entry in read_index(path).tensors.items()}

    def _save_state(self, state: Mapping[str, Tensor], divergence: float) -> None:
        write_file(self.journal.work / STATE, serialize(dict(state)))
        place = {"unit": FINISH, "divergence": divergence}
        self.sink(Event("progress", f"{FINISH}: divergence {divergence:.5f}", place))
        if self.should_stop():
            raise Stopped(len(self.journal.done), len(self.plan.unit_names))


def _read_if_there(checkpoint: Checkpoint, name: str) -> Tensor | None:
    return checkpoint.read(name) if name in checkpoint.tensors else None


def _float_places(block: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Every parameter and buffer of a block that belongs to no quantized layer: its name, its module, its own name."""
    for prefix, module in block.named_modules():
        if not isinstance(module, QuantizedLinear):
            for leaf in (*module._parameters, *module._buffers):
                yield f"{prefix}.{leaf}" if prefix else leaf, module, leaf
