"""``bitwright eval`` on the screen: one table."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bitwright.cli.progress import JsonLines, choose_progress
from bitwright.cli.tables import format_duration, format_number, format_size, format_table
from bitwright.cli.terminal import printable
from bitwright.core.memory import no_collections

if TYPE_CHECKING:
    from bitwright.evaluation.records import Comparison, Row

__all__ = ["render_comparison", "run_eval"]


def run_eval(models: Sequence[str], options: Mapping[str, Any], *, as_json: bool, plain: bool) -> None:
    """Compare models, and print the table or, as the last of the JSON lines, the whole comparison.

    Raises:
        BitwrightError: whatever :func:`bitwright.eval` raises.
    """
    with no_collections():
        from bitwright.evaluation.comparison import evaluate

    progress = choose_progress(as_json=as_json, plain=plain)
    try:
        comparison = evaluate(models, **options, on_event=progress)
    finally:
        progress.close()
    if isinstance(progress, JsonLines):
        progress.say(json.dumps({"event": "comparison", **comparison.to_dict()}))
    else:
        progress.say("\n" + render_comparison(comparison))


def render_comparison(comparison: Comparison) -> str:
    """The table, and below it what was read; intervals are half the width of the 95% interval."""
    beside = comparison.reference is not None
    kinds = list(comparison.probe_counts)
    header = ["model", "size", "bits/weight", "perplexity"]
    header += ["KL mean", "KL p99", "top-1"] if beside else []
    rows = [_cells(row, kinds, beside=beside) for row in comparison.rows]
    tasks = list(comparison.rows[0].tasks)
    lines = [format_table([*header, *kinds, *tasks, "time"], rows)]
    text = comparison.text
    part = "" if text.used == text.available else f" of {text.available:,}"
    facts = f"{text.used:,}{part} tokens of {text.source} in {text.windows} windows of {text.seqlen}"
    facts += f", each begun with {printable(text.start)}" if text.start else ""
    lines += ["", f"read: {facts}, computed in {comparison.dtype or 'the stored dtype'}"]
    if beside:
        lines.append(f"reference: {comparison.reference}; KL is KL(reference || model) in nats per token")
    if kinds:
        counts = ", ".join(f"{count} {kind}" for kind, count in comparison.probe_counts.items())
        lines.append(f"probes, share of right answers: {counts}")
    if tasks:
        lines.append(f"tasks of lm-eval: {', '.join(tasks)}")
    if not kinds and comparison.probes_skipped:
        lines.append(f"probes: {comparison.probes_skipped}")
    return "\n".join(lines)


def _cells(row: Row, kinds: Sequence[str], *, beside: bool) -> list[str]:
    cells = [
        f"{row.name} (reference)" if row.is_reference else row.name,
        format_size(row.size_bytes),
        f"{row.bits_per_weight:.3f}",
        _with_interval(row.perplexity, row.perplexity_ci),
    ]
    if beside:
        cells += [_with_interval(row.kl_mean, row.kl_mean_ci), format_number(row.kl_p99)]
        cells.append("-" if row.top1 is None else f"{row.top1:.1%}")
    cells += ["-" if row.probes is None else f"{row.probes[kind]:.0%}" for kind in kinds]
    cells += [f"{score:.4g}" for score in row.tasks.values()]
    return [*cells, format_duration(row.seconds)]


def _with_interval(value: float | None, interval: tuple[float, float] | None) -> str:
    """``7.21 ±0.16``: as many digits after the point in both."""
    if value is None or interval is None:
        return format_number(value)
    text, half = format_number(value), (interval[1] - interval[0]) / 2
    if "e" in text:
        return f"{text} ±{half:.0e}"
    return f"{text} ±{half:.{len(text.partition('.')[2])}f}"
