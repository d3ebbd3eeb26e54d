"""``bitwright calibrate`` on the screen: progress, what was written, and whether few bits are safe."""

from __future__ import annotations

import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.cli.failures import Interrupted
from bitwright.cli.progress import JsonLines, Progress, choose_progress
from bitwright.cli.quantization import resume_command
from bitwright.cli.signals import stop_on_signals
from bitwright.cli.tables import format_duration, format_number, format_table

if TYPE_CHECKING:
    from bitwright.evaluation.kv_check import KVCheck
    from bitwright.quantization.kv_calibration import Calibrated

__all__ = ["CalibrateRequest", "render_check", "run_calibrate"]

CHECKED_SAMPLES, CHECKED_TOKENS = 4, 512


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateRequest:
    """What was asked.

    Attributes:
        arguments: the command line as it was given.
        options: those of :func:`bitwright.calibrate`, but the model and the output.
        check: also measure whether few bits are safe.
        lmdeploy: a directory for LMDeploy's files, for ``ranks`` tensor-parallel ranks.
    """

    arguments: Sequence[str]
    model: str
    output: Path | None
    options: Mapping[str, Any]
    check: bool
    lmdeploy: Path | None
    ranks: int
    symmetric: bool


def run_calibrate(request: CalibrateRequest, *, as_json: bool, plain: bool) -> None:
    """Calibrate, showing what happens.

    Raises:
        Interrupted: if a signal stopped the run; its message has the command that resumes.
        BitwrightError: whatever :func:`bitwright.calibrate` raises.
    """
    from bitwright.quantization.events import Event, Stopped
    from bitwright.quantization.kv_calibration import calibrate

    _refuse_export(request)
    command = resume_command(request.arguments)
    progress = choose_progress(as_json=as_json, plain=plain)

    def listen(event: Event) -> None:
        if event.kind != "result" or isinstance(progress, JsonLines):
            progress(event)

    def announce(number: int) -> None:
        progress.say("stopping after this block; press again to stop now")

    try:
        with stop_on_signals(announce, lambda: f"stopped; to resume: {command}") as stop:
            made = calibrate(request.model, request.output, **request.options, on_event=listen, should_stop=stop)
    except Stopped as stopped:
        text = f"stopped after block {stopped.done} of {stopped.total}; to resume: {command}"
        raise Interrupted(stop.number or signal.SIGINT, text) from None
    finally:
        progress.close()
    exported = _export(request, made)
    check = _check(request, progress) if request.check else None
    if isinstance(progress, JsonLines):
        record = {"event": "calibrated", "output": str(made.output), "files": [*made.files, *exported]}
        progress.say(json.dumps(record | {"check": None if check is None else check.to_dict()}))
    else:
        progress.say(_render(request, made, exported, check))


def _refuse_export(request: CalibrateRequest) -> None:
    """Raises BW201 for what could not be exported, before hours are spent on it."""
    from bitwright.core.errors import ArgumentError
    from bitwright.formats.checkpoint import open_checkpoint
    from bitwright.models.hf import read_config
    from bitwright.models.kv_export import refuse_ranks
    from bitwright.models.location import resolve_model

    if request.lmdeploy is None:
        if request.ranks != 1 or request.symmetric:
            what = "--tensor-parallel and --symmetric are about LMDeploy's files"
            raise ArgumentError("BW201", what, suggestion="--export-lmdeploy DIR, where they go")
        return
    config = read_config(open_checkpoint(resolve_model(request.model))).get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)
    if heads:
        refuse_ranks(heads, request.ranks, where=request.model)


def _export(request: CalibrateRequest, made: Calibrated) -> tuple[str, ...]:
    if request.lmdeploy is None:
        return ()
    from bitwright.models.kv_export import export_lmdeploy
    from bitwright.models.kv_parameters import read_ranges
    from bitwright.models.location import resolve_model

    ranges = read_ranges(made.output, made.layers, model=resolve_model(request.model))
    return export_lmdeploy(request.lmdeploy, ranges, ranks=request.ranks, symmetric=request.symmetric)


def _check(request: CalibrateRequest, progress: Progress) -> KVCheck:
    from bitwright.evaluation.kv_check import check_kv
    from bitwright.formats.checkpoint import open_checkpoint
    from bitwright.models.hf import context_length
    from bitwright.models.loading import load
    from bitwright.models.location import resolve_model
    from bitwright.quantization.events import Event
    from bitwright.quantization.kv_calibration import calibration_tokens

    directory = resolve_model(request.model)
    model = load(directory)
    options = request.options
    most = min(CHECKED_TOKENS, context_length(model.config) or CHECKED_TOKENS, options["seqlen"] or CHECKED_TOKENS)
    samples = min(CHECKED_SAMPLES, options["samples"])
    tokens = calibration_tokens(open_checkpoint(directory), options["dataset"], samples, most, options["seed"])
    found = check_kv(model, tokens.windows, on_step=lambda step: progress(Event("progress", f"checking {step}", {})))
    progress.close()
    return found


def _render(request: CalibrateRequest, made: Calibrated, exported: Sequence[str], check: KVCheck | None) -> str:
    from bitwright.models.location import resolve_model

    text = f"{made.samples} samples of {made.seqlen} tokens of {made.source}"
    lines = [f"calibrated {made.layers} layers on {text} in {format_duration(made.seconds)}"]
    lines += [f"wrote {', '.join(made.files)} to {made.output}"]
    if exported:
        lines.append(f"wrote {len(exported)} files for LMDeploy to {request.lmdeploy}")
    is_beside = made.output.resolve() == resolve_model(request.model).resolve()
    scheme, more = ("int8-static", ",int8-static") if is_beside else ("int8", "")
    if not is_beside:
        lines.append("int8-static reads kv_parameters.safetensors beside the weights alone: copy it there to use it")
    if check is not None:
        lines += ["", render_check(check)]
        scheme = check.recommended
    lines += ["", "next:", f"  bitwright chat {request.model} --kv-cache {scheme}"]
    lines.append(f"  bitwright eval {request.model} --kv-cache none,int8{more},int4-rotated")
    return "\n".join(lines)


def render_check(check: KVCheck) -> str:
    """Two tables, each layer alone and each scheme for all, and what is recommended."""
    names = list(check.layers[0].kl) if check.layers else []
    rows = [
        [
            str(layer.layer),
            *(format_number(layer.kl[name]) for name in names),
            format_number(layer.key_offset),
            format_number(layer.key_spread),
            layer.unsafe and f"unsafe: {layer.unsafe}",
        ]
        for layer in check.layers
    ]
    header = ["layer", *(f"KL {name}" for name in names), "key offset", "key spread", ""]
    schemes = [
        [row.scheme, format_number(row.kl), f"{row.top1:.1%}", f"{row.bytes_per_token:,.0f}"] for row in check.schemes
    ]
    lines = ["each layer alone, the others float (KL in nats per token):", format_table(header, rows)]
    lines += ["", "all layers:", format_table(["scheme", "KL", "top-1", "bytes per token"], schemes), ""]
    lines.append(f"recommended: {check.recommended} (checked on {check.tokens:,} tokens)")
    return "\n".join(lines)
