"""``bitwright.calibrate``: the ranges of keys and values over a text, measured block by block.

A block is loaded, run on every sample with an observer in place of its cache, and let go; what it has shown, and the
inputs of the next block, are on disk before the journal says so. Models that are quantized already are smaller, and
run as a whole.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.threads import thread_count
from bitwright.formats.checkpoint import Checkpoint, open_checkpoint
from bitwright.formats.safetensors_file import read_tensor, serialize
from bitwright.formats.safetensors_index import read_index
from bitwright.formats.storage import (
    lock_directory,
    make_directory,
    remove_tree,
    write_file,
)
from bitwright.models.blocks import Blocks, find_blocks, linears
from bitwright.models.embedded_model import embedded_directory
from bitwright.models.hf import context_length, load_tokenizer, read_config
from bitwright.models.kv_parameters import write_ranges
from bitwright.models.kv_ranges import Range, Ranges, weights_identity
from bitwright.models.kv_scales import attention_names, write_scales
from bitwright.models.kv_storage import SIDES
from bitwright.models.loading import load_checkpoint
from bitwright.models.location import resolve_model
from bitwright.models.names import state_names
from bitwright.quantization.calibration import (
    CalibrationTokens,
    cut_windows,
    read_calibration_text,
    tokenize,
    window_length,
)
from bitwright.quantization.capture import BlockCall, Captured, capture, run_block
from bitwright.quantization.events import Event, EventSink, Stopped, ignore_event
from bitwright.quantization.journal import Journal, UnitRecord
from bitwright.quantization.kv_statistics import KINDS, KVObserver, Observation, observed_linears
from bitwright.quantization.named_texts import read_named_text
from bitwright.quantization.report import versions
from bitwright.quantization.sources import DiskSource

__all__ = ["STATISTICS_FILES", "Calibrated", "calibrate", "calibration_tokens"]

STATISTICS_FILES = {kind: f"{kind}_stats.safetensors" for kind in KINDS}
WORK = ".kv_calibration"
CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past", "cache")


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What a calibration has written.

    Attributes:
        model: its name as it was given.
        output: the directory.
        files: names of the files in it.
        layers: how many layers keep keys and values.
        samples, seqlen, source: the text.
        seconds: it took, in this call.
    """

    model: str
    output: Path
    files: tuple[str, ...]
    layers: int
    samples: int
    seqlen: int
    source: str
    seconds: float


def calibrate(
    model: str | Path,
    output: str | Path | None = None,
    *,
    dataset: str | Path = "calibration",
    samples: int = 128,
    seqlen: int | None = None,
    seed: int = 0,
    threads: int | None = None,
    kv_cache_scheme: str | None = None,
    restart: bool = False,
    on_event: EventSink | None = None,
    should_stop: Callable[[], bool] = bool,
) -> Calibrated:
    """Measure the ranges of a model's keys and values, which cache schemes such as ``int8-static`` need.

    Args:
        model: a directory, a hub id, or ``demo:``; float, or quantized in any format that bitwright reads.
        output: where the files go; the model's own directory unless given.
        dataset: a text file; ``calibration`` or ``heldout``, which ship with bitwright; ``ptb``, ``wikitext2``, ``c4``.
        samples, seqlen: how many windows of how many tokens (by default 2048, or the model's context if shorter).
        kv_cache_scheme: ``fp8`` (which vLLM takes) or ``int8``: also write ``k_scale`` and ``v_scale`` into the
            checkpoint, a compressed-tensors one, and say so in its ``config.json``.
        restart: discard an unfinished calibration.
        on_event, should_stop: progress listener, and a question asked after each block.

    Returns:
        What was written: statistics (min, max, absmax, mean) of keys and values, ``[kv_heads, head_dim]``, and of
        inputs and outputs of linear layers; the ranges.

    Raises:
        BitwrightError: BW201 for an argument, BW401, BW402 for the text, BW602 for NaN; what opening the model raises.
        Stopped: if ``should_stop`` said so; the same call resumes.

    Example:
        >>> bitwright.calibrate("model", samples=32)
    """
    _check_counts(samples=samples, seqlen=seqlen)
    started, directory = time.perf_counter(), resolve_model(model)
    target, checkpoint = _target(directory, output), open_checkpoint(directory)
    if kv_cache_scheme is not None:
        attention_names(checkpoint, kv_cache_scheme)  # says at once if there can be none
    tokens = calibration_tokens(checkpoint, dataset, samples, seqlen, seed)
    command, sink = f"bitwright calibrate {model}", on_event or ignore_event
    run = _Run(checkpoint, tokens, target, sink, should_stop, restart, command, kv_cache_scheme)
    with thread_count(threads), torch.no_grad():
        files, layers = run.measure(seed)
    run.sink(Event("result", f"wrote {len(files)} files to {target}", {"files": list(files)}))
    count, length = tokens.windows.shape
    return Calibrated(str(model), target, files, layers, count, length, tokens.source, time.perf_counter() - started)


def _check_counts(**counts: int | None) -> None:
    for (name, value), least in zip(counts.items(), (1, 2), strict=True):
        if value is not None and (type(value) is not int or value < least):
            raise ArgumentError("BW201", f"{name} is {value!r}", suggestion=f"a whole number of at least {least}")


def _target(directory: Path, output: str | Path | None) -> Path:
    """Where the files go."""
    if output is None and directory == embedded_directory():
        what = "the embedded model is part of the program, and keeps no files"
        raise ArgumentError("BW201", what, suggestion="--work-dir DIR, which then has them")
    return directory if output is None else Path(output)


@dataclass(frozen=True, slots=True)
class _Run:
    checkpoint: Checkpoint
    tokens: CalibrationTokens
    target: Path
    sink: EventSink
    should_stop: Callable[[], bool]
    restart: bool
    command: str
    scales: str | None

    def measure(self, seed: int) -> tuple[tuple[str, ...], int]:
        """Run the model, write the files; returns their names and how many layers there are."""
        is_quantized = self.checkpoint.quantization is not None
        tensors, layers = self.resident() if is_quantized else self.streamed()
        samples, seqlen = self.tokens.windows.shape
        notes = {"source": self.tokens.source, "samples": samples, "seqlen": seqlen, "seed": seed}
        files = _write(self.target, self.checkpoint, tensors, layers, notes, self.scales)
        remove_tree(self.target / WORK)
        return files, len(layers)

    def resident(self) -> tuple[dict[str, Tensor], list[int]]:
        """Run the whole model; there is nothing to resume."""
        model = load_checkpoint(self.checkpoint)
        observation = Observation()
        base = getattr(model, model.base_model_prefix, model)
        for number, window in enumerate(self.tokens.windows):
            base(input_ids=window.unsqueeze(0), past_key_values=KVObserver(observation), use_cache=True)
            self.sink(Event("progress", f"sample {number + 1} of {len(self.tokens.windows)}", {}))
        return observation.tensors(), _layers(observation.extents["key"], type(model).__name__)

    def streamed(self) -> tuple[dict[str, Tensor], list[int]]:
        """Block by block; what an earlier call has finished is taken over."""
        source = DiskSource(self.checkpoint.directory)
        blocks = find_blocks(source.model)
        work = self.target / WORK
        fingerprint = {
            "weights": weights_identity(self.checkpoint),
            "tokens": self.tokens.fingerprint(),
            "threads": torch.get_num_threads(),
            "versions": versions(),
        }
        make_directory(work)
        with lock_directory(work):
            journal = Journal(work, fingerprint, self.command, blocks.names())
            journal.open(anew=self.restart)
            _Stream(self, source, blocks, journal).run()
            tensors: dict[str, Tensor] = {}
            for record in journal.done:
                tensors |= _read(work / record.file)
        keys = {name.split(".")[1] for name in tensors if name.startswith("key.")}
        return tensors, _layers(keys, type(source.model).__name__)


class _Stream:
    """The blocks of one run."""

    def __init__(self, run: _Run, source: DiskSource, blocks: Blocks, journal: Journal) -> None:
        self.given, self.source, self.blocks, self.journal = run, source, blocks, journal
        names = state_names(source.model)
        self.inside = {block: [name for name in names if name.startswith(block + ".")] for block in blocks.names()}

    def run(self) -> None:
        done, total = len(self.journal.done), len(self.blocks.modules)
        if done:
            self.given.sink(Event("resume", f"found {done}/{total} blocks done and intact", {"done": done}))
        if done == total:
            return
        captured = self._capture()
        inputs = list(captured.inputs)
        if done:
            saved = _read(self.journal.work / self.journal.done[-1].inputs[0])  # type: ignore[index]
            inputs = [saved[name] for name in sorted(saved)]
        for number in range(done, total):
            inputs = self._block(number, inputs, captured.calls[number])
            if self.given.should_stop() and number + 1 < total:
                raise Stopped(number + 1, total)

    def _capture(self) -> Captured:
        """How the model calls its blocks, and the inputs of the first."""
        inside = {name for names in self.inside.values() for name in names}
        before = [name for name in self.source.shapes() if name not in inside]
        first = self.inside[self.blocks.names()[0]]
        self.given.sink(Event("progress", "running the samples up to the first block", {}))
        self.source.unify()
        self.source.load([*before, *first])
        model = self.source.model
        base = getattr(model, getattr(model, "base_model_prefix", ""), model)
        windows = self.given.tokens.windows
        captured = capture(model, self.blocks, [partial(_forward, base, window) for window in windows])
        self.source.release([*before, *first])
        return captured

    def _block(self, number: int, inputs: list[Tensor], calls: tuple[BlockCall, ...]) -> list[Tensor]:
        """Run one block on every sample, and write down what it showed and made."""
        started = time.perf_counter()
        name, block = self.blocks.names()[number], self.blocks.modules[number]
        self.source.load(self.inside[name])
        observation = Observation()
        outputs = []
        with observed_linears(linears(block, name), observation):
            for hidden, call in zip(inputs, calls, strict=True):
                outputs.append(run_block(block, hidden, _with_cache(block, call, KVObserver(observation))))
        self.source.release(self.inside[name])
        self._commit(number, observation, outputs, started)
        return outputs

    def _commit(self, number: int, observation: Observation, outputs: list[Tensor], started: float) -> None:
        tensors, saved = observation.tensors(), {f"{at:06d}": output for at, output in enumerate(outputs)}
        file, kept = f"statistics-{number + 1:05d}.safetensors", f"inputs-{number + 1:05d}.safetensors"
        total = len(self.blocks.modules)
        inputs = (kept, write_file(self.journal.work / kept, serialize(saved))) if number + 1 < total else None
        record = UnitRecord(
            unit=self.blocks.names()[number],
            file=file,
            sha256=write_file(self.journal.output / file, serialize(tensors)),
            tensors={name: tensor.nbytes for name, tensor in tensors.items()},
            inputs=inputs,
            seconds=round(time.perf_counter() - started, 3),
        )
        self.journal.append(record)
        data = {"done": number + 1, "total": total, "seconds": record.seconds}
        data["eta_seconds"] = record.seconds * (total - number - 1)
        self.given.sink(Event("unit", f"{record.unit} measured", data))


def calibration_tokens(
    checkpoint: Checkpoint, dataset: str | Path, samples: int, seqlen: int | None, seed: int
) -> CalibrationTokens:
    """The windows of a data set (see :func:`calibrate`) that a model is calibrated, or checked, on."""
    config = read_config(checkpoint)
    context = context_length(config.get_text_config(decoder=True))
    length = window_length(seqlen, context, option="--calib-seqlen")
    tokenizer = load_tokenizer(checkpoint.directory)
    text = read_named_text(dataset) or read_calibration_text(dataset)
    ids = tokenize(tokenizer, text)
    if seqlen is None and len(ids) < length:
        length = max(2, len(ids))
    return cut_windows(ids, samples=samples, seqlen=length, seed=seed, source=str(dataset))


def _with_cache(block: nn.Module, call: BlockCall, cache: KVObserver) -> BlockCall:
    """The call with an observer where the block takes a cache.

    Raises:
        BitwrightError: BW313 if it takes none.
    """
    named = next((name for name in CACHE_NAMES if name in call.keywords), None)
    if named is not None:
        return replace(call, keywords={**call.keywords, named: cache, "use_cache": True})
    parameters = list(inspect.signature(block.forward).parameters)
    shift = 1 if call.hidden_keyword is None else 0
    for name in CACHE_NAMES:
        if name in parameters and 0 <= parameters.index(name) - shift < len(call.arguments):
            at = parameters.index(name) - shift
            return replace(call, arguments=(*call.arguments[:at], cache, *call.arguments[at + 1 :]))
        if name in parameters:
            return replace(call, keywords={**call.keywords, name: cache})
    what = f"{type(block).__name__} takes no cache of keys and values"
    raise BitwrightError("BW313", what, suggestion="int8 and int4 need no calibration")


def _layers(names: Iterable[str], model: str) -> list[int]:
    layers = sorted(int(name) for name in names)
    if not layers:
        what = f"{model} has put nothing into the cache of keys and values"
        raise BitwrightError("BW313", what, suggestion="int8 and int4 need no calibration")
    return layers


def _write(
    target: Path,
    checkpoint: Checkpoint,
    tensors: Mapping[str, Tensor],
    layers: list[int],
    notes: Mapping[str, Any],
    scales: str | None,
) -> tuple[str, ...]:
    """The four files of statistics, scales for the checkpoint, then the ranges, which say that all is there."""
    make_directory(target)
    written = []
    metadata = {"calibration": repr(dict(notes))}
    for kind, file in STATISTICS_FILES.items():
        chosen = {name.removeprefix(kind + "."): each for name, each in tensors.items() if name.startswith(kind + ".")}
        if chosen:
            write_file(target / file, serialize(chosen, metadata))
            written.append(file)
    ranges: dict[int, Ranges] = {
        layer: {
            side: Range(tensors[f"{side}.{layer}.min"].amin(-1), tensors[f"{side}.{layer}.max"].amax(-1))
            for side in SIDES
        }
        for layer in layers
    }
    identity = weights_identity(checkpoint)
    beside = () if scales is None else write_scales(checkpoint, ranges, scales)
    return (*written, *beside, write_ranges(target, ranges, notes, weights=identity))


def _read(path: Path) -> dict[str, Tensor]:
    index = read_index(path)
    return {name: read_tensor(path, entry) for name, entry in index.tensors.items()}


def _forward(base: nn.Module, window: Tensor) -> object:
    return base(input_ids=window.unsqueeze(0), use_cache=False)
