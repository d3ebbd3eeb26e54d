"""The model card of a quantized checkpoint, generated from its report; equal runs give equal cards."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from bitwright.quantization.report import Report

__all__ = ["CARD_FILE", "CARD_MARK", "render_card"]

CARD_FILE = "README.md"
CARD_MARK = "Quantized by bitwright "  # tells our card from one that somebody wrote

READERS = {
    "compressed-tensors": "transformers, vLLM and SGLang load it as it is",
    "gptq": "GPTQModel loads it, and so does transformers beside it and optimum; vLLM and SGLang know the format",
    "awq": "GPTQModel loads it, and so does transformers beside it; vLLM and SGLang know the format",
}


def render_card(report: Report) -> str:
    """Markdown for people who find the checkpoint: what it is, how it was made, what it cost, how to load it."""
    return "\n".join(_lines(report)) + "\n"


def _lines(report: Report) -> Iterator[str]:
    name = report.source.rstrip("/").rpartition("/")[2]
    yield from (
        "---",
        "library_name: transformers",
        f"base_model: {json.dumps(name, ensure_ascii=False)}",
        "tags: [bitwright, quantized]",
        "---",
        "",
    )
    yield f"# {name}, {report.recipe['scheme']}"
    yield ""
    yield f"{CARD_MARK}{report.versions['bitwright']} with `{report.recipe['algorithm']}`."
    yield ""
    yield "| | |"
    yield "|---|---|"
    yield f"| format | {report.format} |"
    yield f"| bits per weight, scales included | {report.bits_per_weight:.3f} |"
    yield f"| quantized parameters | {report.quantized_parameters:,} of {report.parameters:,} |"
    yield f"| weights, before and after | {_megabytes(report.source_bytes)} → {_megabytes(report.weight_bytes)} |"
    yield f"| calibration | {_calibration(report)} |"
    yield f"| left in floating point | {_listed(report.unquantized)} |"
    yield ""
    if report.recipe["overrides"]:
        yield "Overrides: " + ", ".join(
            f"`{rule['pattern']}` → {rule['scheme']}{_by(rule)}" for rule in report.recipe["overrides"]
        )
        yield ""
    for notice in report.notices:
        yield f"> {notice}"
        yield ""
    yield "## Worst layers"
    yield ""
    yield "| layer | scheme | relative weight error |"
    yield "|---|---|---|"
    for layer, error in report.worst_layers():
        yield f"| {layer} | {report.layers[layer]['scheme']} | {error:.4f} |"
    yield ""
    yield "## Load it"
    yield ""
    yield from ("```python", "import bitwright", "", 'model = bitwright.load("path/to/this/directory")', "```")
    readers = READERS.get(report.format.partition("_")[0])
    if readers is not None:
        yield ""
        yield f"The checkpoint is in the {report.format} format: {readers}."
    yield ""
    yield "The record of every layer is in `report.json`."


def _by(rule: Mapping[str, Any]) -> str:
    """The algorithm and options of an override that has its own."""
    options = ", ".join(f"{name}={json.dumps(value)}" for name, value in rule.get("options", {}).items())
    algorithm = rule.get("algorithm")
    return (f" by {algorithm}" if algorithm else "") + (f" with {options}" if options else "")


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.1f} MB"


def _calibration(report: Report) -> str:
    if report.calibration is None:
        return "none (data-free)"
    record = report.calibration
    return f"{record['samples']} samples of {record['seqlen']} tokens from {record['source']}"


def _listed(names: tuple[str, ...]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:5])
    return (shown + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "no linear layer"
