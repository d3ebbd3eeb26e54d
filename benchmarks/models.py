"""Third-party trained models, quantized and measured against their originals on third-party texts.

    python -m benchmarks.models --models ../shared/models --data ../shared/data

Writes a table for people and a record for programs into benchmarks/results/. Neither models nor texts are part of the
project; what is not there is said to be missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import bitwright
from bitwright import BitwrightError

SHARED = Path(__file__).resolve().parents[2] / "shared"
RESULTS = Path(__file__).resolve().parent / "results"
SCHEMES = ("w8", "w4g32", "w3g32", "nf4g32", "w8a8")
# How to store a model: the first way that takes every layer is used, and what the others say is recorded.
WAYS = (
    {"format": "compressed-tensors"},
    {"format": "native"},
    {"format": "native", "group_fallback": "pad"},  # a shorter last group where groups do not divide
)
MAX_TOKENS = 65_536
UNKNOWN = "unknown"  # stands for the words that the text has as <unk>


@dataclass(frozen=True)
class Text:
    """A text of the data directory, and how it is made fit for a model."""

    path: str
    prepare: Callable[[str], str]
    how: str


def _plain_words(text: str) -> str:
    return text.replace("<unk>", UNKNOWN)


def _stories(text: str) -> str:
    stories = [story.strip() for story in text.split("<|endoftext|>")]
    return "".join(f"<s>{story}" for story in stories[:-1])  # the last one is cut off by the end of the file


WIKITEXT = Text("wikitext-2/test.txt", _plain_words, f"`<unk>` read as `{UNKNOWN}`")
TINYSTORIES = Text("tinystories/train_head_2MiB.txt", _stories, "`<s>` before each story, as the model was trained")
# What none of the models was trained on: damage there is damage, too.
OTHERS = (
    Text("gutenberg/carroll-alice.txt", str.strip, "as it is"),
    Text("tinyshakespeare/input.txt", str.strip, "as it is"),
)
OTHER_TOKENS = 16_384
MODELS: Mapping[str, Text] = {
    "wikitext-qwen2-6m": WIKITEXT,
    "BabyLlama-361-0.97M": TINYSTORIES,
    "stories260K": TINYSTORIES,
    "llama2xs-279K": TINYSTORIES,
}


def main() -> None:
    """Quantize, measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=SHARED / "models")
    parser.add_argument("--data", type=Path, default=SHARED / "data")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--only", nargs="*", default=list(MODELS), choices=list(MODELS), metavar="MODEL")
    parser.add_argument("--schemes", nargs="*", default=list(SCHEMES))
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS)
    options = parser.parse_args()
    results, missing = {}, []
    with tempfile.TemporaryDirectory(prefix="bitwright-models-") as folder:
        for name in options.only:
            if not (options.models / name).is_dir() or not (options.data / MODELS[name].path).is_file():
                missing.append(name)
                print(f"{name}: skipped, it or its text is not there")
                continue
            results[name] = measure_model(name, options, Path(folder))
    command = "python -m benchmarks.models"
    if options.max_tokens != MAX_TOKENS:
        command += f" --max-tokens {options.max_tokens}"
    record = {"command": command, "machine": machine_facts(), "models": results, "missing": missing}
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "models.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (options.output / "models.md").write_text(render(record), encoding="utf-8")
    print(render(record))


def measure_model(name: str, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Quantize one model by every scheme and compare the results with it."""
    source = options.models / name
    made: dict[str, dict[str, Any]] = {}
    for scheme in options.schemes:
        made[scheme] = quantize(source, folder / name / scheme, scheme)
        print(f"{name} {scheme}: {made[scheme]['format']}, {made[scheme]['seconds']:.1f} s", flush=True)
    started = time.perf_counter()
    result = evaluate(source, folder, made, MODELS[name], options.data, options.max_tokens)
    others = [text for text in OTHERS if (options.data / text.path).is_file()]
    result["others"] = [
        evaluate(source, folder, made, text, options.data, min(OTHER_TOKENS, options.max_tokens)) for text in others
    ]
    return result | {"quantized": made, "seconds": time.perf_counter() - started}


def evaluate(
    source: Path, folder: Path, made: Mapping[str, Any], text: Text, data: Path, tokens: int
) -> dict[str, Any]:
    """Compare what was made of ``source``, in ``folder``, with it on one text."""
    prepared = folder / "text.txt"
    prepared.write_text(text.prepare((data / text.path).read_text("utf-8")), encoding="utf-8")
    comparison = bitwright.eval(
        [folder / source.name / scheme for scheme in made],
        reference=source,
        text=prepared,
        max_tokens=tokens,
        on_event=lambda event: print(f"  {event.message}", flush=True) if event.kind != "progress" else None,
    )
    measured = comparison.to_dict()
    *rows, reference = measured.pop("rows")
    for row, scheme in zip(rows, made, strict=True):
        row["name"] = scheme
    reference["name"] = "original"
    notices = [notice.replace(f"{folder}{os.sep}", "") for notice in measured.pop("notices")]
    return {
        "text": {**measured["text"], "source": text.path, "prepared": text.how},
        "dtype": measured["dtype"],
        "rows": [reference, *rows],
        "notices": [notice.replace(str(source), source.name) for notice in notices],
    }


def quantize(source: Path, output: Path, scheme: str) -> dict[str, Any]:
    """Quantize in the first way that stores every layer; what the others say goes into the record."""
    refusals = {}
    for way in WAYS:
        flags = [part for name, value in way.items() for part in (f"--{name.replace('_', '-')}", value)]
        try:
            report = bitwright.quantize(source, output, scheme=scheme, **way)
        except BitwrightError as error:
            if error.code not in ("BW204", "BW205"):
                raise
            refusals[" ".join(flags)] = str(error)
            continue
        command = ["bitwright", "quantize", f"../shared/models/{source.name}", "-o", f"{source.name}-{scheme}"]
        return {
            "format": way["format"],
            "command": shlex.join([*command, "--scheme", scheme, *flags]),
            "seconds": report.run["seconds"],
            "refused": refusals,
            "worst_layers": report.worst_layers(3),
        }
    raise SystemExit(f"no format takes {scheme}: {refusals}")


def machine_facts() -> dict[str, Any]:
    """What the times depend on."""
    return {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "bitwright": bitwright.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }


def render(record: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    facts = record["machine"]
    lines = [
        "# Trained models of other people, quantized by round-to-nearest",
        "",
        f"`{record['command']}`, {facts['date']}: bitwright {facts['bitwright']}, torch {facts['torch']}, "
        f"{facts['machine']}, {facts['threads']} threads. Figures beside the tables are in `models.json`.",
        "",
        "KL is KL(original || quantized) over the whole vocabulary in nats per token; brackets are 95% intervals "
        "(bootstrap over windows). Bits per weight are those of the quantized layers, scales included.",
    ]
    for name, result in record["models"].items():
        lines += _render_model(name, result)
    for name in record["missing"]:
        lines += ["", f"{name} was not there and is not measured."]
    return "\n".join(lines) + "\n"


def _render_model(name: str, result: Mapping[str, Any]) -> list[str]:
    text = result["text"]
    original = result["rows"][0]
    lines = [
        "",
        f"## {name}",
        "",
        f"The first {text['used']:,} of {text['available']:,} tokens of {text['source']} ({text['prepared']}) in "
        f"{text['windows']} windows of {text['seqlen']}; activations in {result['dtype']}.",
        "",
        "| | format | bits/weight | size | perplexity | ratio | KL mean | KL p99 | top-1 |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in result["rows"]:
        made = result["quantized"].get(row["name"], {"format": "float"})
        perplexity, ratio = row["perplexity"], row["perplexity"] and row["perplexity"] / original["perplexity"]
        cells = [row["name"], made["format"], f"{row['bits_per_weight']:.2f}", f"{row['size_bytes'] / 1e3:,.0f} kB"]
        cells += ["inf", "inf"] if perplexity is None else [f"{perplexity:.4g}", f"{ratio:.4f}"]
        if row["is_reference"]:
            cells += ["-", "-", "-"]
        else:
            low, high = row["kl_mean_ci"] or (row["kl_mean"], row["kl_mean"])
            cells += [f"{row['kl_mean']:.2e} [{low:.2e}, {high:.2e}]", f"{row['kl_p99']:.2e}", f"{row['top1']:.2%}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += _render_others(result["others"])
    lines += ["", "```", *(made["command"] for made in result["quantized"].values()), "```"]
    refusals: dict[tuple[str, str], list[str]] = {}
    for scheme, made in result["quantized"].items():
        for flags, refusal in made["refused"].items():
            refusals.setdefault((flags, refusal), []).append(scheme)
    for (flags, refusal), schemes in refusals.items():
        lines += ["", f"`{flags}` is refused for {', '.join(schemes)}:", "", "```", refusal, "```"]
    return lines + [part for notice in result["notices"] for part in ("", f"> {notice}")]


def _render_others(others: Sequence[Mapping[str, Any]]) -> list[str]:
    """One table of all other texts: what becomes of the perplexity, and the divergence."""
    if not others:
        return []
    texts = [f"{each['text']['source']} ({each['text']['used']:,} tokens)" for each in others]
    lines = ["", "| | " + " | ".join(f"{text}: perplexity | KL mean" for text in texts) + " |"]
    lines.append("|---|" + "---:|" * (2 * len(others)))
    for rows in zip(*(each["rows"] for each in others), strict=True):
        cells = [rows[0]["name"]]
        for row in rows:
            cells.append("inf" if row["perplexity"] is None else f"{row['perplexity']:.4g}")
            cells.append("-" if row["is_reference"] else f"{row['kl_mean']:.2e}")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


if __name__ == "__main__":
    main()
