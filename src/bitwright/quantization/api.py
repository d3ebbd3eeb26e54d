"""``bitwright.quantize``: from a model and a scheme to a checkpoint on disk, or to a quantized module in memory."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from bitwright.core.errors import BitwrightError
from bitwright.core.recipe import Override, Recipe, parse_override
from bitwright.core.scheme import LayerScheme
from bitwright.core.scheme_names import parse
from bitwright.core.threads import thread_count
from bitwright.formats.checkpoint import INDEX, WORK_DIRECTORY
from bitwright.formats.storage import lock_directory, make_directory, remove_empty_directory
from bitwright.models.blocks import refuse_other_products
from bitwright.models.hf import PreTrainedModel, context_length, load_tokenizer
from bitwright.models.loading import check_vocabulary
from bitwright.models.location import resolve_model
from bitwright.quantization.account import make_report, plan_facts, sample_notices
from bitwright.quantization.algorithms import check_options, make_method
from bitwright.quantization.calibration import (
    CalibrationTokens,
    cut_windows,
    read_calibration_text,
    tokenize,
    window_length,
)
from bitwright.quantization.destination import (
    check_output,
    clear_output,
    clear_work,
    put_in_place,
    resumes_replacement,
    shard_directory,
)
from bitwright.quantization.device_memory import DEVICE_LEVERS, check_device, device_bytes
from bitwright.quantization.device_stream import CudaLane, find_device, on_device
from bitwright.quantization.estimate import MEMORY_LEVERS, Estimate, check_resources, estimate
from bitwright.quantization.events import Event, EventSink, ignore_event
from bitwright.quantization.finishing import final_records
from bitwright.quantization.job import Job, fingerprint
from bitwright.quantization.journal import Journal, has_units
from bitwright.quantization.plan import GroupFallback, Plan, make_plan
from bitwright.quantization.report import Report, host_facts, peak_resident_bytes
from bitwright.quantization.rotated import RotatedSource, rotate_source
from bitwright.quantization.sources import DiskSource, MemorySource, Source, refuse_nonfinite
from bitwright.quantization.writer import check_companions, finish_checkpoint

__all__ = ["quantize"]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Request:
    """The arguments of :func:`quantize` that decide how it goes, not what comes out."""

    output: Path
    format: str | None
    group_fallback: GroupFallback
    overwrite: bool
    restart: bool
    drop_nonfinite: bool
    command: str
    sink: EventSink
    should_stop: Callable[[], bool]
    device: torch.device


def quantize(
    model: str | Path | nn.Module,
    output: str | Path,
    *,
    scheme: str | LayerScheme = "w4g128",
    algorithm: str = "rtn",
    options: Mapping[str, Any] | None = None,
    format: str | None = None,
    calibration: str | Path | None = None,
    samples: int = 128,
    seqlen: int | None = None,
    overrides: Sequence[str | Override] = (),
    seed: int = 0,
    threads: int | None = None,
    device: str | torch.device = "cpu",
    group_fallback: GroupFallback = "error",
    on_nonfinite: Literal["stop", "drop-sample"] = "stop",
    overwrite: bool = False,
    restart: bool = False,
    command: str | None = None,
    on_event: EventSink = ignore_event,
    should_stop: Callable[[], bool] = lambda: False,
) -> Report:
    """Quantize a causal language model block by block into a checkpoint directory.

    Memory holds one block at a time, whatever the size of the model. A run that ends early resumes when it is called
    again with the same arguments, and its result is the same to the last bit.

    Args:
        model: a local directory, a hub id, ``demo:``, or a module in memory (which is not changed).
        output: the directory to write; it must not hold a finished checkpoint unless ``overwrite``.
        scheme: what is stored, such as ``w4g128``; see :func:`bitwright.core.scheme_names.parse`.
        algorithm: how weights are rounded, one of ``bitwright.quantization.algorithms.ALGORITHMS``.
        options: of the algorithm, by name.
        format: ``compressed-tensors`` or ``native``; by default the first of them that can store every layer.
        calibration: text file or name of a text that ships with bitwright; needed by calibrated algorithms, and with
            any other it adds measured output errors to the report.
        samples, seqlen: how many windows of how many tokens (by default 2048, or the model's context if shorter).
        overrides: rules such as ``lm_head=w8``, ``.*[.]down_proj=w8g32``, ``type:Linear=float``,
            ``.*[.]q_proj=w4g32@gptq(damp=0.05)``; the last match wins.
        seed: of everything random.
        threads: for arithmetic; part of what a resumed run must repeat.
        device: where blocks are worked on, ``cpu`` or a GPU such as ``cuda``; part of what a resumed run must repeat.
            A GPU holds one block while the next is copied to it, and the activations of all samples.
        group_fallback: what to do where groups do not divide a layer: ``error``, ``pad``, ``per-channel``, ``skip``.
        on_nonfinite: what to do with a calibration sample that makes NaN or infinity inside the model.
        overwrite: replace a finished checkpoint, once the new one is complete; there must be room for both.
        restart: discard an unfinished checkpoint.
        command: what an unfinished directory tells people to run; by default this call, in Python.
        on_event, should_stop: progress listener, and a question asked after each block.

    Returns:
        The report that is also written as ``report.json``.

    Raises:
        BitwrightError: with a code of the catalogue; nothing that was finished is lost.
        Stopped: if ``should_stop`` said so.

    Example:
        >>> report = bitwright.quantize("demo:", "demo-w4", scheme="w4g128")
    """
    shown = (
        "scheme",
        "algorithm",
        "options",
        "format",
        "calibration",
        "samples",
        "seqlen",
        "overrides",
        "seed",
        "threads",
        "device",
    )
    given = {name: value for name, value in locals().items() if name in (*shown, "group_fallback", "on_nonfinite")}
    recipe = _recipe(scheme, algorithm, options, overrides, seed)
    _check_numbers(samples, seqlen, threads, seed)
    if on_nonfinite not in ("stop", "drop-sample"):
        raise BitwrightError("BW201", f"on_nonfinite is {on_nonfinite!r}", suggestion="stop or drop-sample")
    request = _Request(
        output=Path(output),
        format=format,
        group_fallback=group_fallback,
        overwrite=overwrite,
        restart=restart,
        drop_nonfinite=on_nonfinite == "drop-sample",
        command=command or _python_call(model, output, given),
        sink=on_event,
        should_stop=should_stop,
        device=find_device(device),
    )
    with thread_count(threads):
        source, name = _open_source(model, recipe, request)
        plan = make_plan(source, recipe, format=format, group_fallback=group_fallback)
        if plan.is_calibrated and calibration is None:
            calibration = "calibration"
        tokens = None if calibration is None else _calibration(source, calibration, samples, seqlen, seed)
        if plan.finish is not None and tokens is not None and len(tokens.windows) < 2:
            what = f"{algorithm} needs two calibration samples at least: one to train on and one to judge by"
            raise BitwrightError("BW401", what, suggestion="more --samples, or a longer text")
        _check_device(source, plan, tokens, request.device)
        return _run(source, name, plan, recipe, tokens, samples, request)


def _refuse_broken(source: Source, plan: Plan) -> None:
    """Look at the weights before anything is made, and before an old checkpoint is given up."""
    refuse_nonfinite(source.original if isinstance(source, RotatedSource) else source)
    refuse_other_products({name: source.model.get_submodule(name) for name in plan.schemes})


def _run(
    source: Source,
    name: str,
    plan: Plan,
    recipe: Recipe,
    tokens: CalibrationTokens | None,
    samples: int,
    request: _Request,
) -> Report:
    started = time.perf_counter()
    notices = plan.notices + sample_notices(tokens, samples)
    needed = estimate(source, plan, tokens)
    planned = plan_facts(name, plan, recipe, tokens, needed, request.output)
    if request.device.type != "cpu":
        del planned["seconds"]  # they are a processor's
        planned |= {"device": str(request.device), "device_bytes": device_bytes(source, plan, tokens)}
    request.sink(Event("plan", f"{len(plan.schemes)} layers to {recipe.scheme.name}", planned))
    for notice in notices:
        request.sink(Event("notice", notice))
    check_companions(source)
    if not _resumes(request):
        _refuse_broken(source, plan)
    work = request.output / WORK_DIRECTORY
    make_directory(work)
    try:
        with lock_directory(work):
            # Another run may have ended here since the first look.
            check_output(request.output, source.directory, overwrite=request.overwrite)
            shards = shard_directory(request.output, overwrite=request.overwrite)
            check_resources(shards, plan, needed)
            settings = fingerprint(source, plan, recipe, tokens, request.device)
            journal = Journal(request.output, settings, request.command, plan.unit_names, shards=shards)
            is_new = not _resumes(request)
            journal.open(anew=is_new)
            if is_new:
                clear_output(request.output, shards)
            _do_units(source, plan, recipe, tokens, journal, needed, request)
            records = final_records(plan, journal.done)
            report = make_report(name, source, plan, recipe, tokens, records, notices)
            facts = {"seconds": round(time.perf_counter() - started, 3), "peak_resident_bytes": peak_resident_bytes()}
            report = replace(report, run={**facts, **host_facts(), "date": time.strftime("%Y-%m-%d")})
            if shards != request.output:
                put_in_place(request.output)
            finish_checkpoint(request.output, source, plan, records, report)
            clear_work(work)
    finally:
        remove_empty_directory(work)
    request.sink(Event("result", f"wrote {request.output}", report.to_dict()))
    return report


def _resumes(request: _Request) -> bool:
    """Whether there is an unfinished run with something to resume, and it is not to be discarded."""
    has_ended = (request.output / INDEX).exists() and not resumes_replacement(request.output)
    return has_units(request.output) and not request.restart and not (request.overwrite and has_ended)


def _do_units(
    source: Source,
    plan: Plan,
    recipe: Recipe,
    tokens: CalibrationTokens | None,
    journal: Journal,
    needed: Estimate,
    request: _Request,
) -> None:
    with ExitStack() as stack:
        if request.device.type != "cpu":
            order = [unit.tensors for unit in plan.units if unit.is_block]
            source = stack.enter_context(on_device(source, CudaLane(request.device), order))
        job = Job(
            source=source,
            plan=plan,
            recipe=recipe,
            calibration=tokens,
            output=journal.shards,
            journal=journal,
            sink=request.sink,
            should_stop=request.should_stop,
            drop_nonfinite=request.drop_nonfinite,
            device=request.device,
        )
        with torch.no_grad(), _memory_errors(needed):
            job.run()


def _check_device(source: Source, plan: Plan, tokens: CalibrationTokens | None, device: torch.device) -> None:
    """Refuse what does not run on a GPU, or does not fit it."""
    if device.type == "cpu":
        return
    if plan.finish is not None:
        what = f"{plan.finish[0].name} goes over the whole model at the end, which it does on the CPU alone"
        raise BitwrightError("BW201", what, suggestion="device='cpu', or an algorithm without that pass")
    check_device(device, device_bytes(source, plan, tokens))


def _open_source(model: str | Path | nn.Module, recipe: Recipe, request: _Request) -> tuple[Source, str]:
    """The weights, once it is clear that the output may be written; rotated, if the algorithm begins with that."""
    source: DiskSource | MemorySource
    if isinstance(model, nn.Module):
        check_output(request.output, None, overwrite=request.overwrite)
        source, name = MemorySource(model), type(model).__name__
    else:
        directory = resolve_model(model)
        check_output(request.output, directory, overwrite=request.overwrite)
        source, name = DiskSource(directory), str(model)
    method = make_method(recipe.algorithm, recipe.options)
    rotate = method.algorithm.rotate
    return (source if rotate is None else rotate_source(source, method.options[rotate.name], recipe.seed)), name


def _calibration(source: Source, name: str | Path, samples: int, seqlen: int | None, seed: int) -> CalibrationTokens:
    if source.directory is None:
        message = "calibration text needs a tokenizer, and a model in memory has none"
        raise BitwrightError(
            "BW401", message, suggestion="use bitwright.prepare and run your own batches through the model"
        )
    context = context_length(getattr(source.model, "config"))  # noqa: B009 - nn.Module does not declare it
    length = window_length(seqlen, context)
    tokenizer = load_tokenizer(source.directory)
    check_vocabulary(cast(PreTrainedModel, source.model), tokenizer)  # a directory's model is one of transformers
    ids = tokenize(tokenizer, read_calibration_text(name))
    return cut_windows(ids, samples=samples, seqlen=length, seed=seed, source=str(name))


def _check_numbers(samples: int, seqlen: int | None, threads: int | None, seed: int) -> None:
    for field, value, least in (
        ("samples", samples, 1),
        ("seqlen", seqlen, 2),
        ("threads", threads, 1),
        ("seed", seed, 0),
    ):
        if value is not None and (type(value) is not int or value < least):
            raise BitwrightError("BW201", f"{field} is {value!r}", suggestion=f"a whole number of at least {least}")


def _recipe(
    scheme: str | LayerScheme,
    algorithm: str,
    options: Mapping[str, Any] | None,
    overrides: Sequence[str | Override],
    seed: int,
) -> Recipe:
    if isinstance(overrides, str):
        raise BitwrightError("BW201", f"overrides is the text {overrides!r}", suggestion=f"a list: [{overrides!r}]")
    rules = tuple(rule if isinstance(rule, Override) else parse_override(rule) for rule in overrides)
    stored = scheme if isinstance(scheme, LayerScheme) else parse(scheme)
    recipe = Recipe(scheme=stored, algorithm=algorithm, options=dict(options or {}), overrides=rules, seed=seed)
    check_options(recipe)
    return recipe


def _python_call(model: object, output: str | Path, options: Mapping[str, Any]) -> str:
    """The call that resumes a run, with every argument that is not as by default."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(quantize).parameters.items()}
    given = {name: value for name, value in options.items() if value != defaults[name]}
    shown = "model" if isinstance(model, nn.Module) else repr(str(model))
    return f"bitwright.quantize({', '.join([shown, repr(str(output)), *(f'{n}={v!r}' for n, v in given.items())])})"


@contextmanager
def _memory_errors(needed: Estimate) -> Iterator[None]:
    """Say which levers there are when memory runs out after all; finished blocks are on disk."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            what = f"the memory of the GPU ran out: {str(error).partition('.')[0]}"
            raise BitwrightError("BW503", what, suggestion=f"{DEVICE_LEVERS}; the same command resumes") from error
        if isinstance(error, RuntimeError) and "not enough memory" not in str(error):
            raise
        message = f"memory ran out; about {needed.peak_bytes / 1e9:.1f} GB were expected to be enough"
        raise BitwrightError("BW503", message, suggestion=f"{MEMORY_LEVERS}; the same command resumes") from None
