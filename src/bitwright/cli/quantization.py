"""``bitwright quantize`` on the screen: the plan, progress, signals, and the five-row result."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitwright.cli.failures import Interrupted
from bitwright.cli.progress import JsonLines, Progress, ProgressEvent, choose_progress
from bitwright.cli.signals import GRACE_SECONDS, stop_on_signals
from bitwright.cli.tables import format_duration, format_number, format_size
from bitwright.core.errors import BitwrightError
from bitwright.core.memory import no_collections, read_ahead

if TYPE_CHECKING:
    from bitwright.evaluation.records import Comparison
    from bitwright.quantization.report import Report

__all__ = [
    "QuantizeRequest",
    "render_plan",
    "render_result",
    "resume_command",
    "run_quantize",
]

# Up to this size a model is also measured before and after, unless asked otherwise: that takes seconds.
CHECKED_BYTES = 256 << 20
CHECKED_TOKENS, CHECKED_SEQLEN = 4096, 256


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeRequest:
    """What was asked.

    Attributes:
        arguments: the command line as it was given.
        options: those of :func:`bitwright.quantize`.
        check: whether to measure perplexity before and after; ``None``: if the model is small.
    """

    arguments: Sequence[str]
    model: str
    output: Path
    options: Mapping[str, Any]
    check: bool | None


class _Display:
    """Passes events on to a :class:`Progress`, and remembers what the signal messages need."""

    def __init__(self, progress: Progress, request: QuantizeRequest) -> None:
        self.progress, self.request = progress, request
        self.at, self.seconds = 1, 0.0

    def __call__(self, event: ProgressEvent) -> None:
        self.at = int(event.data.get("at", self.at))
        self.seconds = float(event.data.get("seconds", self.seconds)) if event.kind == "unit" else self.seconds
        if event.kind == "plan" and not isinstance(self.progress, JsonLines):
            self.progress.say(render_plan(event, self.request.output))
        elif event.kind == "notice" and not isinstance(self.progress, JsonLines):
            self.progress.say(f"notice: {event.message}")
        elif event.kind != "result" or isinstance(self.progress, JsonLines):
            self.progress(event)

    def announce(self, number: int) -> None:
        """Tell that the run will stop, when, and how to stop it now."""
        about = f" (~{format_duration(self.seconds)})" if self.seconds else ""
        again = "press again to stop now"
        if number == signal.SIGTERM:
            again = f"at the latest in {GRACE_SECONDS:.0f} s"
        text = f"stopping after block {self.at}{about}; {again}"
        is_json = isinstance(self.progress, JsonLines)
        self.progress.say(json.dumps({"event": "notice", "message": text}) if is_json else text)


def run_quantize(request: QuantizeRequest, *, as_json: bool, plain: bool) -> None:
    """Quantize, showing what happens.

    Raises:
        Interrupted: if a signal stopped the run; its message has the command that resumes.
        BitwrightError: whatever :func:`bitwright.quantize` raises.
    """
    read_ahead(Path(request.model))
    with no_collections():
        from bitwright.quantization.api import quantize
        from bitwright.quantization.events import Stopped

    command = resume_command(request.arguments)
    progress = choose_progress(as_json=as_json, plain=plain)
    display = _Display(progress, request)

    def describe_stop() -> str:
        return f"stopped during block {display.at}; to resume: {command}"

    try:
        with stop_on_signals(display.announce, describe_stop) as stop:
            report = quantize(
                request.model, request.output, **request.options, command=command, on_event=display, should_stop=stop
            )
        progress.close()
        comparison = _measure(request, report, display)
    except Stopped as stopped:
        text = f"stopped after block {stopped.done} of {stopped.total}; to resume: {command}"
        raise Interrupted(stop.number or signal.SIGINT, text) from None
    finally:
        progress.close()
    if as_json:
        if comparison is not None:
            progress.say(json.dumps({"event": "check", **comparison.to_dict()}))
    else:
        progress.say(render_result(request, report, comparison))


def resume_command(arguments: Sequence[str]) -> str:
    """The command line that goes on where this one stopped: the same, but never ``--restart``."""
    return shlex.join(["bitwright", *(text for text in arguments if text != "--restart")])


def render_plan(event: ProgressEvent, output: Path) -> str:
    """What will be done and what it takes, from the ``plan`` event."""
    data = event.data
    free = shutil.disk_usage(next(path for path in (output, *output.absolute().parents) if path.exists())).free
    calibration = data.get("calibration")
    rows = {
        "plan": f"{data['model']} to {data['scheme']} by {data['algorithm']}, format {data['format']}",
        "layers": f"{data['layers']} in {data['blocks']} blocks; {data['left_float']} left in floating point",
    }
    if data["overrides"]:
        rows["overrides"] = "; ".join(f"{how}: {_name_some(layers)}" for how, layers in data["overrides"].items())
    rows |= {
        "calibration": "none" if not calibration else f"{calibration[0]} samples of {calibration[1]} tokens",
        "size": f"{format_size(data['source_bytes'])} -> {format_size(data['output_bytes'])}, {format_size(free)} free",
    }
    if "seconds" in data:
        rows["time"] = f"about {format_duration(data['seconds'])}" if data["seconds"] > 1 else "about a second"
    if "peak_bytes" in data:
        rows["memory"] = f"about {format_size(data['peak_bytes'])} at most"
    if "device_bytes" in data:
        rows["device"] = f"{data['device']}, about {format_size(data['device_bytes'])} at most"
    rows["output"] = str(output)
    return "\n".join(f"{name:<12} {text}" for name, text in rows.items()) + "\n"


def _name_some(layers: Sequence[str]) -> str:
    """All of a few names, or the first and how many there are."""
    return ", ".join(layers) if len(layers) <= 3 else f"{layers[0]} and {len(layers) - 1} more"


def render_result(request: QuantizeRequest, report: Report, comparison: Comparison | None) -> str:
    """The five rows: size, bits per weight, perplexity, speed, worst layer. Then what to type next."""
    seconds = float(report.run["seconds"])
    name, error = report.worst_layers(1)[0]
    percent = 100 * report.weight_bytes / max(1, report.source_bytes)
    before = 8 * report.source_bytes / max(1, report.parameters)
    out, model = shlex.quote(str(request.output)), shlex.quote(request.model)
    rows = {
        "size": f"{format_size(report.source_bytes)} -> {format_size(report.weight_bytes)} ({percent:.0f}%)",
        "bits/weight": f"{before:.0f} -> {report.bits_per_weight:.3f} (scales included)",
        "perplexity": _render_perplexity(comparison),
        "speed": f"{format_duration(seconds)}, {format_size(report.source_bytes / max(seconds, 1e-3))}/s"
        f"; peak memory {format_size(report.run['peak_resident_bytes'])}",
        "worst layer": f"{name}, relative error {format_number(error)}",
    }
    lines = ["", *(f"{name:<12} {text}" for name, text in rows.items()), ""]
    lines += [
        "next:",
        f"  bitwright eval {out} --reference {model}",
        f"  bitwright generate {out} 'Once upon a time'",
        f"  bitwright inspect {out} --kernels",
    ]
    return "\n".join(lines)


def _render_perplexity(comparison: Comparison | None) -> str:
    if comparison is None:
        return "not measured here: the first command below does, or --check"
    after, before = comparison.rows[0], comparison.rows[-1]
    figures = f"{format_number(before.perplexity)} -> {format_number(after.perplexity)} (x{_ratio(comparison):.3f})"
    return f"{figures} on a short text; top-1 agreement {after.top1:.1%}"


def _ratio(comparison: Comparison) -> float:
    return comparison.rows[0].perplexity / comparison.rows[-1].perplexity


def _measure(request: QuantizeRequest, report: Report, display: _Display) -> Comparison | None:
    """Perplexity before and after on a short text, where that takes seconds or was asked for."""
    wanted = report.source_bytes <= CHECKED_BYTES if request.check is None else request.check
    if not wanted:
        return None
    from bitwright.evaluation.comparison import evaluate
    from bitwright.evaluation.subjects import find_subjects
    from bitwright.quantization.events import Event

    def listen(event: ProgressEvent) -> None:
        if event.kind == "notice":
            display(event)

    if not isinstance(display.progress, JsonLines):
        display.progress.say(f"measuring perplexity before and after on {CHECKED_TOKENS:,} tokens of text ...")
    try:
        context = find_subjects([request.output], None)[0][0].context
        return evaluate(
            [request.output],
            reference=request.model,
            max_tokens=CHECKED_TOKENS,
            seqlen=min(CHECKED_SEQLEN, context or CHECKED_SEQLEN),
            probes=False,
            on_event=listen,
        )
    except BitwrightError as error:
        if request.check:
            raise
        # Nobody asked for it, and the checkpoint is whole: it must not look as if the command had failed.
        display(Event("notice", f"perplexity was not measured: {error.what}"))
        return None
