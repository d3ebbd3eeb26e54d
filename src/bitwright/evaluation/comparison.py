"""``bitwright.eval``: several models on one text, beside a reference, in one table."""

from __future__ import annotations

import importlib
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from bitwright.core.errors import ArgumentError, BitwrightError, Notice
from bitwright.core.kv_scheme import KVScheme, parse_kv
from bitwright.core.memory import trim_memory
from bitwright.core.settings import read_settings
from bitwright.core.threads import thread_count
from bitwright.evaluation.measurement import LogitSource, Measurement, ModelLogits, measure
from bitwright.evaluation.probes import EncodedProbe, encode_probes, first_of_each_kind, probe_counts, right_answers
from bitwright.evaluation.records import Comparison, Row, TextFacts
from bitwright.evaluation.reference_cache import CachedLogits, model_fingerprint, open_cache
from bitwright.evaluation.subjects import (
    ModelLike,
    Subject,
    check_tokenizers,
    choose_window,
    find_subjects,
    worst_layers,
)
from bitwright.evaluation.windows import TokenWindows, cut_text, start_token
from bitwright.models.embedded_model import read_probes
from bitwright.models.hf import Tokenizer, read_config
from bitwright.quantization.calibration import read_calibration_text, tokenize
from bitwright.quantization.events import Event, EventSink, ignore_event
from bitwright.quantization.report import peak_resident_bytes

__all__ = ["COLLAPSE_RATIO", "evaluate"]

COLLAPSE_RATIO = 1.5  # of perplexities
RunTasks = Callable[[nn.Module], dict[str, float]]
BATCH = 4
BATCH_BYTES = 128 << 20  # of logits, in float32


@dataclass
class _Session:
    """What all rows of one comparison share."""

    text: TokenWindows
    batch: int
    dtype: torch.dtype | None
    probes: tuple[EncodedProbe, ...]
    probes_skipped: str
    run_tasks: RunTasks | None
    on_event: EventSink
    total: int
    done: int = 0
    started: float = field(default_factory=time.perf_counter)
    notices: list[str] = field(default_factory=list)

    def notice(self, message: str) -> None:
        """Tell the listener; where nobody listens, warn."""
        self.notices.append(message)
        if self.on_event is ignore_event:
            warnings.warn(message, Notice, stacklevel=4)
        else:
            self.on_event(Event("notice", message))

    def window(self, name: str, done: int, total: int) -> None:
        data = {"model": name, "windows_done": done, "windows": total}
        self.on_event(Event("progress", f"reading with {name}: {done} of {total} windows", data))

    def finish(self, row: Row) -> None:
        self.done += 1
        elapsed = time.perf_counter() - self.started
        data = {
            "model": row.name,
            "done": self.done,
            "total": self.total,
            "seconds": row.seconds,
            "eta_seconds": elapsed / self.done * (self.total - self.done),
        }
        self.on_event(Event("unit", f"{row.name} has perplexity {row.perplexity:.4g}, {row.seconds:.1f} s", data))


def evaluate(
    models: Sequence[ModelLike],
    *,
    reference: ModelLike | None = None,
    text: str | Path | None = None,
    seqlen: int | None = None,
    max_tokens: int | None = None,
    probes: bool | int = True,
    start: bool | None = None,
    kv_cache: Sequence[str | int | KVScheme] = (),
    tasks: Sequence[str] = (),
    task_path: str | Path | None = None,
    task_limit: int | None = None,
    dtype: torch.dtype | None = torch.float32,
    tokenizer: str | Path | None = None,
    batch: int | None = None,
    threads: int | None = None,
    on_event: EventSink | None = None,
) -> Comparison:
    """Measure ``models``: size, perplexity, the embedded questions, and how far each is from ``reference``.

    Args:
        models: directories, ``demo:``, ids on the hub, or pairs of a name and a model in memory.
        reference: what divergence and agreement are measured against, usually the model before quantization.
        text: a UTF-8 file, or ``heldout`` (the default) or ``calibration``, which ship with the embedded model.
        seqlen: tokens in a window, of which all but the first are predicted; 512, or the models' context if shorter.
        max_tokens: read only so many tokens of the text; the result says so.
        probes: also ask the embedded questions (a number: so many of each kind), where the tokenizer is theirs.
        start: begin every window with the token that the tokenizer puts before texts; ``None``: if it puts one there,
            as models are trained that have one (the result says which it is).
        kv_cache: cache schemes (``none``, ``int8``, ``int4-rotated``, ...): each model is measured with each of them,
            and beside the first model without, unless there is a ``reference``.
        tasks: of lm-eval (``mmlu``, ``gsm8k``, ...), whose scores are further columns; their data are lm-eval's affair.
        task_path: a directory with tasks of one's own, in lm-eval's format.
        task_limit: only so many questions of each task.
        dtype: of activations and of all that is not quantized; ``None``: as each model stores it, whose rounding then
            hides small differences. Models in memory are taken as they are.
        tokenizer: the model directory whose tokenizer reads the text, where only models in memory are measured.
        batch: windows read at a time; 4, or 1 for large vocabularies.
        threads: torch threads while measuring.
        on_event: told of progress; notices, which are warnings otherwise, go there too.

    Raises:
        BitwrightError: BW201 for an argument, BW312 if the models do not share one tokenizer, BW401 or BW402 for the
            text, BW601 if a model gives NaN; and whatever :func:`bitwright.load` raises.

    Example:
        >>> bitwright.eval(["out"], reference="demo:").rows[0].kl_mean
    """
    _check_counts(batch=batch, threads=threads, task_limit=task_limit)
    if isinstance(kv_cache, str):
        raise ArgumentError("BW201", f"kv_cache is {kv_cache!r}", suggestion="a list of names of cache schemes")
    schemes = [scheme if isinstance(scheme, KVScheme) else parse_kv(scheme) for scheme in kv_cache]
    subjects, beside = find_subjects(models, reference, schemes)
    everyone = [*subjects, beside] if beside else subjects
    reader, is_embedded = check_tokenizers(everyone, tokenizer)
    run_tasks = _find_tasks(reader, tasks, task_path, task_limit)
    first = _choose_start(reader, start)
    windows = _read_text(reader, text, choose_window(everyone, seqlen), max_tokens, first)
    asked, skipped = _choose_probes(probes, is_embedded, everyone, reader)
    batch = batch or _choose_batch(everyone, windows)
    sink = on_event or ignore_event
    session = _Session(windows, batch, dtype, asked, skipped, run_tasks, sink, total=len(everyone))
    with thread_count(threads):
        rows = _rows(session, subjects, beside)
    return _comparison(session, rows, beside, None if first is None else str(reader.convert_ids_to_tokens(first)))


def _find_tasks(reader: Tokenizer, tasks: Sequence[str], path: str | Path | None, limit: int | None) -> RunTasks | None:
    """What scores a model on lm-eval's tasks, if there are any."""
    if isinstance(tasks, str) or not all(isinstance(task, str) and task for task in tasks):
        raise ArgumentError("BW201", f"tasks is {tasks!r}", suggestion="a list of names of lm-eval's tasks")
    if not tasks:
        return None
    try:
        harness = importlib.import_module("bitwright.evaluation.harness")
    except ImportError as error:
        what = "tasks are lm-eval's, which is not installed"
        raise ArgumentError("BW201", what, why=str(error), suggestion="pip install 'bitwright[harness]'") from None
    where = None if path is None else Path(path)
    return lambda model: dict(harness.run_tasks(model, reader, tasks, path=where, limit=limit))


def _choose_start(reader: Tokenizer, wanted: bool | None) -> int | None:
    if wanted is not None and not isinstance(wanted, bool):
        raise ArgumentError("BW201", f"start is {wanted!r}", suggestion="True, False or None")
    found = start_token(reader) if wanted is not False else None
    if wanted and found is None:
        raise ArgumentError("BW201", "start is True, and the tokenizer puts no token before texts", suggestion="None")
    return found


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (type(value) is not int or value < 1):
            raise ArgumentError("BW201", f"{name} is {value!r}", suggestion="a whole number, at least 1")


def _read_text(
    reader: Tokenizer, text: str | Path | None, seqlen: int, max_tokens: int | None, start: int | None
) -> TokenWindows:
    source = "heldout" if text is None else text
    ids = tokenize(reader, read_calibration_text(source))
    return cut_text(ids, seqlen=seqlen, source=str(source), max_tokens=max_tokens, start=start)


def _comparison(session: _Session, rows: tuple[Row, ...], beside: Subject | None, start: str | None) -> Comparison:
    text = session.text
    return Comparison(
        rows=rows,
        reference=beside.name if beside else None,
        text=TextFacts(
            source=text.source,
            available=text.available,
            used=text.used,
            predicted=text.predicted,
            windows=len(text.windows),
            seqlen=text.seqlen,
            start=start,
        ),
        dtype=None if session.dtype is None else str(session.dtype).removeprefix("torch."),
        probe_counts=probe_counts(session.probes),
        probes_skipped=session.probes_skipped,
        notices=tuple(session.notices),
    )


def _choose_batch(subjects: Sequence[Subject], windows: TokenWindows) -> int:
    vocabulary = max(subject.vocabulary for subject in subjects)
    return BATCH if BATCH * windows.seqlen * vocabulary * 4 <= BATCH_BYTES else 1


def _choose_probes(
    wanted: bool | int, is_embedded: bool, subjects: Sequence[Subject], reader: Tokenizer
) -> tuple[tuple[EncodedProbe, ...], str]:
    """The questions to ask, or none and why."""
    if not isinstance(wanted, int) or wanted < 0:
        raise ArgumentError("BW201", f"probes is {wanted!r}", suggestion="True, False, or how many of each kind")
    if not wanted:
        return (), "not asked for"
    if not is_embedded:
        return (), "they are written for the embedded model, and these models have another tokenizer"
    chosen = read_probes() if wanted is True else first_of_each_kind(read_probes(), wanted)
    encoded = encode_probes(chosen, partial(tokenize, reader))
    longest = max(len(probe.tokens) for probe in encoded)
    short = [subject.name for subject in subjects if subject.context is not None and subject.context < longest]
    if short:
        return (), f"the longest has {longest} tokens, more than the context of {short[0]}"
    return encoded, ""


def _rows(session: _Session, subjects: Sequence[Subject], beside: Subject | None) -> tuple[Row, ...]:
    """The row of each model, and that of the reference, which is measured first, last."""
    if beside is None:
        return tuple(_row(session, subject) for subject in subjects)
    loader = _Loader(beside, session.dtype)
    logits = _reference_logits(session, beside, loader)
    last = _row(session, beside, loader=loader, logits=logits)
    if logits.cache is not None:
        loader.release()  # everything that the others need of it is on disk
    rows = []
    for subject in subjects:
        row = _row(session, subject, reference=logits)
        rows.append(row)
        if row.perplexity > COLLAPSE_RATIO * last.perplexity:
            session.notice(_collapse(row, last, subject))
    return (*rows, last)


class _Loader:
    """A model that is loaded when it is first needed."""

    def __init__(self, subject: Subject, dtype: torch.dtype | None) -> None:
        self.subject, self.dtype = subject, dtype
        self.model: nn.Module | None = None

    def __call__(self) -> nn.Module:
        if self.model is None:
            self.model = self.subject.load(self.dtype)
        return self.model

    def release(self) -> None:
        self.model = None
        trim_memory()


def _reference_logits(session: _Session, beside: Subject, loader: _Loader) -> CachedLogits:
    """The reference's logits, on disk if they come from files and fit the limit."""
    cache = None
    if beside.checkpoint is not None and beside.directory is not None:
        stored = getattr(read_config(beside.checkpoint), "dtype", None) or torch.float32
        cache = open_cache(
            read_settings().cache,
            model=model_fingerprint(beside.directory, list(beside.checkpoint.files)),
            text=session.text,
            vocabulary=beside.vocabulary,
            dtype=session.dtype or stored,
            batch=session.batch,
            on_failure=session.notice,
        )
    return CachedLogits(loader, session.text, cache, on_failure=session.notice)


def _row(
    session: _Session,
    subject: Subject,
    *,
    loader: _Loader | None = None,
    logits: LogitSource | None = None,
    reference: LogitSource | None = None,
) -> Row:
    """Measure one model; ``logits`` are the reference's own, which may not need the model to be loaded."""
    started = time.perf_counter()
    loader = loader or _Loader(subject, session.dtype)
    source = logits or ModelLogits(loader(), session.text)
    with _evaluation_mode(subject.module):
        try:
            found = measure(
                source,
                session.text,
                batch=session.batch,
                reference=reference,
                on_window=partial(session.window, subject.name),
            )
        except BitwrightError as error:
            if error.code != "BW601":
                raise
            raise BitwrightError(error.code, error.what, where=subject.name, suggestion=error.suggestion) from None
        right = right_answers(loader(), session.probes) if session.probes else None
        scores = session.run_tasks(loader()) if session.run_tasks else {}
    if logits is None:
        loader.release()
    row = _describe(session, subject, found, right, time.perf_counter() - started, is_reference=logits is not None)
    row = replace(row, tasks=scores)
    session.finish(row)
    return row


def _describe(
    session: _Session,
    subject: Subject,
    found: Measurement,
    right: dict[str, int] | None,
    seconds: float,
    *,
    is_reference: bool,
) -> Row:
    size = subject.size()
    perplexity, perplexity_ci = found.perplexity()
    kl_mean, kl_mean_ci = found.mean_divergence() or (None, None)
    top1, top1_ci = found.top1() or (None, None)
    counts = probe_counts(session.probes)
    return Row(
        name=subject.name,
        is_reference=is_reference,
        size_bytes=size.total,
        bits_per_weight=size.bits_per_weight,
        bits_per_parameter=size.bits_per_parameter,
        perplexity=perplexity,
        perplexity_ci=perplexity_ci,
        kl_mean=kl_mean,
        kl_mean_ci=kl_mean_ci,
        kl_p99=found.high_divergence(),
        top1=top1,
        top1_ci=top1_ci,
        probes=None if right is None else {kind: right[kind] / count for kind, count in counts.items()},
        seconds=seconds,
        peak_resident_bytes=peak_resident_bytes(),
    )


def _collapse(row: Row, reference: Row, subject: Subject) -> str:
    """BW603, with the layers to begin with."""
    ratio = row.perplexity / reference.perplexity
    worst = worst_layers(subject.directory)
    named = f"; worst layers: {', '.join(worst)}" if worst else ""
    figures = f"perplexity {row.perplexity:.4g} is {ratio:.1f} times that of {reference.name}"
    return f"BW603 quality collapsed: {row.name}: {figures}{named} (see: bitwright explain BW603)"


@contextmanager
def _evaluation_mode(module: nn.Module | None) -> Iterator[None]:
    """No dropout in a model that the caller was training."""
    was_training = module is not None and module.training
    if module is not None:
        module.eval()
    try:
        yield
    finally:
        if module is not None:
            module.train(was_training)
