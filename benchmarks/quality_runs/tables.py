"""The tables of the quality benchmark: every cell, then ours beside the best peer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from benchmarks.quality_runs.cells import OURS, SCHEMES

__all__ = ["best", "ratio", "render"]

RESAMPLES = 2000
Row = Mapping[str, Any]


def render(record: Mapping[str, Any]) -> str:
    """All tables as Markdown; the summary first."""
    lines = [
        "# Quality beside the peers",
        "",
        f"`{record['command']}`, {record['date']}, torch {record['torch']}, {record['threads']} thread a process on a "
        "machine that much other work shared: seconds are for orientation only, processor seconds say a little more.",
        "",
        "The same float32 models, calibration windows and held-out windows for everyone; peers and bitwright with",
        "their defaults. KL is KL(float || quantized) over the whole vocabulary, nats per token; brackets are 95%",
        "intervals (bootstrap over windows). Ratios are of KL, ours over theirs, below 1 where ours is better; their",
        "intervals draw the same windows for both. Where a group does not divide every layer of a model, it is changed",
        "for everyone to the largest that does (at least 16), else to one scale per channel: `stored as` says so. HQQ",
        "stores a float zero point, the others an integer one.",
    ]
    lines += ["", "## Best of ours beside the best peer", ""]
    lines += _summary(record["models"])
    lines += ["", "## Algorithm by algorithm", ""]
    lines += _families(record["models"])
    for model in record["models"]:
        lines += _model(model)
    lines += [part for name in record["missing"] for part in ("", f"{name} was not there and is not measured.")]
    return "\n".join(lines) + "\n"


def best(rows: Iterable[Row]) -> Row | None:
    """Of least divergence among those that were measured."""
    measured = [row for row in rows if "kl" in row]
    return min(measured, key=lambda row: float(row["kl"]), default=None)


def ratio(ours: Row, theirs: Row) -> tuple[float, float, float]:
    """Of the sums of divergence, and its 95% interval: windows are drawn with replacement, the same for both."""
    above = torch.tensor(ours["kl_windows"], dtype=torch.float64)
    below = torch.tensor(theirs["kl_windows"], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(above), (RESAMPLES, len(above)), generator=generator)
    found = above[drawn].sum(1) / below[drawn].sum(1)
    low, high = torch.quantile(found, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return float(above.sum() / below.sum()), low, high


def _verdict(ours: Row, theirs: Row) -> str:
    value, low, high = ratio(ours, theirs)
    overlap = ours["kl_ci"][0] <= theirs["kl_ci"][1] and theirs["kl_ci"][0] <= ours["kl_ci"][1]
    judged = "better" if high < 1 else "worse" if low > 1 else "even"
    return f"{value:.3f} [{low:.3f}, {high:.3f}] | {'yes' if overlap else 'no'} | {judged}"


HEADER = ["ours | KL | best peer | KL | ratio | intervals overlap | verdict", "---|---|---:|---|---:|---:|---|---"]


def _pairs(title: str, found: Iterable[tuple[str, Row | None, Row | None]]) -> list[str]:
    lines = [f"| {title} | {HEADER[0]} |", f"|{HEADER[1]}|"]
    for name, ours, theirs in found:
        if ours is None or theirs is None:
            continue
        cells = [name, ours["method"], f"{ours['kl']:.4g}", f"{theirs['peer']} {theirs['method']}"]
        lines.append(f"| {' | '.join(cells)} | {theirs['kl']:.4g} | {_verdict(ours, theirs)} |")
    return lines


def _summary(models: Iterable[Mapping[str, Any]]) -> list[str]:
    found = []
    for model in models:
        for scheme in SCHEMES:
            rows = [row for row in model["rows"] if row["scheme"] == scheme]
            ours, theirs = _sides(rows)
            found.append((f"{model['name']} {scheme}", best(ours), best(theirs)))
    return _pairs("model, scheme", found)


def _families(models: Iterable[Mapping[str, Any]]) -> list[str]:
    found = []
    for model in models:
        for scheme in SCHEMES:
            rows = [row for row in model["rows"] if row["scheme"] == scheme]
            for family in dict.fromkeys(row["family"] for row in rows):
                ours, theirs = _sides([row for row in rows if row["family"] == family])
                found.append((f"{model['name']} {scheme}", best(ours), best(theirs)))
    return _pairs("model, scheme", found)


def _sides(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    rows = list(rows)
    return [row for row in rows if row["peer"] == OURS], [row for row in rows if row["peer"] != OURS]


def _model(model: Mapping[str, Any]) -> list[str]:
    beside = model["float"]
    lines = [
        "",
        f"## {model['name']}",
        "",
        f"{model['samples']} calibration windows of {model['seqlen']} tokens, {beside['tokens']:,} predicted tokens "
        f"held out; {model['texts']}. Float perplexity {beside['ppl']:.4f}.",
    ]
    for scheme in SCHEMES:
        rows = [row for row in model["rows"] if row["scheme"] == scheme]
        if rows:
            lines += ["", *_scheme(scheme, rows)]
    return lines


def _scheme(scheme: str, rows: list[Row]) -> list[str]:
    measured = sorted((row for row in rows if "kl" in row), key=lambda row: float(row["kl"]))
    stored = rows[0]["stored"]
    title = scheme if stored == scheme else f"{scheme}, stored as {stored}"
    lines = [f"**{title}**", "", "| by | algorithm | KL | perplexity | top-1 | s | CPU s | peak MB |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|---:|")
    for row in measured:
        low, high = row["kl_ci"]
        cells = [f"**{row['peer']}**" if row["peer"] == OURS else row["peer"], row["method"]]
        cells += [f"{row['kl']:.4g} [{low:.4g}, {high:.4g}]", f"{row['ppl']:.4f}", f"{row['top1']:.2%}"]
        busy = row.get("processor_seconds")
        cells += [f"{row['seconds']:.1f}", "" if busy is None else f"{busy:.1f}", f"{row['peak_bytes'] / 1e6:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    for row in rows:
        if "failed" in row:
            told = row["failed"].replace("|", "/").replace("\n", " ")
            lines.append(f"| {row['peer']} | {row['method']} | {told} | | | | | |")
    return lines
