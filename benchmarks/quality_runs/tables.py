"""The tables of the quality benchmark: every cell, then ours beside the best peer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from benchmarks.quality_runs.cells import OURS, SCHEMES

__all__ = ["apart", "best", "compare", "ratio", "render", "schemes_by_storage"]

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
        "intervals draw the same windows for both (but for those with `~`, whose rows were measured in different runs:",
        "those are wider than they would be). Where a group does not divide every layer of a model, it is changed",
        "for everyone to the largest that does (at least 16), else to one scale per channel: `stored as` says so, and",
        "schemes that come to the same are one. HQQ stores a float zero point, the others an integer one.",
    ]
    compared = record["comparisons"]
    lines += ["", "## Best of ours beside the best peer", ""]
    lines += _comparisons(found for found in compared if found["family"] is None)
    lines += ["", "## Algorithm by algorithm", "", *_overview(compared), ""]
    lines += _comparisons(found for found in compared if found["family"] is not None)
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


def apart(ours: Row, theirs: Row) -> tuple[float, float, float]:
    """As ``ratio`` where the windows of one are not known: as if both had been judged on other windows, so wider."""
    value = float(ours["kl"]) / float(theirs["kl"])
    spread = math.hypot(*(math.log(row["kl_ci"][1] / row["kl_ci"][0]) / 2 for row in (ours, theirs)))
    return value, value * math.exp(-spread), value * math.exp(spread)


def schemes_by_storage(model: Mapping[str, Any]) -> dict[str, list[str]]:
    """The schemes that are stored alike, by what is stored, in the order of ``SCHEMES``.

    A record that does not say what is stored has it from its rows.
    """
    stored = model.get("stored") or {row["scheme"]: row["stored"] for row in model["rows"]}
    alike: dict[str, list[str]] = {}
    for scheme in SCHEMES:
        if scheme in stored:
            alike.setdefault(stored[scheme], []).append(scheme)
    return alike


def compare(models: Iterable[Mapping[str, Any]], earlier: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Our best beside the best peer for each model and scheme (``family`` is ``None``), and within each algorithm.

    Where the windows of a row are not known, the same comparison of an ``earlier`` record stands.
    """
    known = {_key(found): found["ratio"] for found in earlier if found["paired"]}
    compared = []
    for model in models:
        for stored, schemes in schemes_by_storage(model).items():
            rows = [row for row in model["rows"] if row["stored"] == stored]
            for family in (None, *dict.fromkeys(row["family"] for row in rows)):
                among = [row for row in rows if family in (None, row["family"])]
                ours = best(row for row in among if row["peer"] == OURS)
                theirs = best(row for row in among if row["peer"] != OURS)
                if ours is not None and theirs is not None:
                    place = {"model": model["name"], "scheme": ", ".join(schemes), "family": family}
                    compared.append(_comparison(place, ours, theirs, known))
    return compared


def _comparison(place: Mapping[str, Any], ours: Row, theirs: Row, known: Mapping[Any, Any]) -> dict[str, Any]:
    found = {**place, "ours": ours["method"], "theirs": f"{theirs['peer']} {theirs['method']}"}
    found |= {"kl_ours": ours["kl"], "kl_theirs": theirs["kl"]}
    has_windows = "kl_windows" in ours and "kl_windows" in theirs
    paired = ratio(ours, theirs) if has_windows else known.get(_key(found))
    overlap = ours["kl_ci"][0] <= theirs["kl_ci"][1] and theirs["kl_ci"][0] <= ours["kl_ci"][1]
    return found | {"ratio": paired or apart(ours, theirs), "paired": paired is not None, "overlap": overlap}


def _key(found: Mapping[str, Any]) -> tuple[Any, ...]:
    """What a ratio belongs to; another measurement of the same rows has other divergences."""
    divergences = (float(f"{found[name]:.4g}") for name in ("kl_ours", "kl_theirs"))
    return (found["model"], found["ours"], found["theirs"], *divergences)


def _verdict(found: Mapping[str, Any]) -> str:
    _, low, high = found["ratio"]
    return "better" if high < 1 else "worse" if low > 1 else "even"


def _overview(compared: Iterable[Mapping[str, Any]]) -> list[str]:
    """How each algorithm fares over all models and schemes."""
    lines = ["| algorithm | compared | better | even | worse | of these, intervals apart | mean ratio |"]
    lines.append("|---|---:|---:|---:|---:|---:|---:|")
    families: dict[str, list[Mapping[str, Any]]] = {}
    for found in compared:
        if found["family"] is not None:
            families.setdefault(found["family"], []).append(found)
    for family, cells in families.items():
        verdicts = [_verdict(found) for found in cells]
        counts = [verdicts.count(verdict) for verdict in ("better", "even", "worse")]
        apart_ones = sum(_verdict(found) == "worse" and not found["overlap"] for found in cells)
        mean = math.exp(sum(math.log(found["ratio"][0]) for found in cells) / len(cells))
        lines.append(f"| {family} | {len(cells)} | {' | '.join(map(str, counts))} | {apart_ones} | {mean:.2f} |")
    return lines


def _comparisons(compared: Iterable[Mapping[str, Any]]) -> list[str]:
    lines = ["| model, scheme | ours | KL | best peer | KL | ratio | intervals overlap | verdict |"]
    lines.append("|---|---|---:|---|---:|---:|---|---|")
    for found in compared:
        value, low, high = found["ratio"]
        cells = [f"{found['model']} {found['scheme']}", found["ours"], f"{found['kl_ours']:.4g}", found["theirs"]]
        cells += [f"{found['kl_theirs']:.4g}", f"{value:.3f} {'' if found['paired'] else '~'}[{low:.3f}, {high:.3f}]"]
        lines.append(f"| {' | '.join([*cells, 'yes' if found['overlap'] else 'no', _verdict(found)])} |")
    return lines


def _model(model: Mapping[str, Any]) -> list[str]:
    beside = model["float"]
    lines = [
        "",
        f"## {model['name']}",
        "",
        f"{model['samples']} calibration windows of {model['seqlen']} tokens, {beside['tokens']:,} predicted tokens "
        f"held out; {model['texts']}. Float perplexity {beside['ppl']:.4f}.",
    ]
    for stored, schemes in schemes_by_storage(model).items():
        rows = [row for row in model["rows"] if row["stored"] == stored]
        if rows:
            named = ", ".join(schemes)
            lines += ["", *_scheme(named if schemes == [stored] else f"{named}, stored as {stored}", rows)]
    return lines


def _scheme(title: str, rows: list[Row]) -> list[str]:
    measured = sorted((row for row in rows if "kl" in row), key=lambda row: float(row["kl"]))
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
