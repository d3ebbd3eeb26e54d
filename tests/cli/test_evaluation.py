"""``bitwright eval``: the table shows what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bitwright.cli import main
from bitwright.cli.evaluation import render_comparison
from bitwright.evaluation.records import Comparison, Row, TextFacts

ROW = Row(
    name="w4",
    is_reference=False,
    size_bytes=3_100_000,
    bits_per_weight=4.125,
    bits_per_parameter=5.5,
    perplexity=3.5512,
    perplexity_ci=(3.40, 3.70),
    kl_mean=5.47e-07,
    kl_mean_ci=(5.0e-07, 6.0e-07),
    kl_p99=0.0263,
    top1=0.948,
    top1_ci=(0.94, 0.95),
    probes={"qa": 0.86, "copy": 1.0},
    seconds=12.0,
    peak_resident_bytes=1,
)
BASE = replace(ROW, name="base", is_reference=True, kl_mean=None, kl_mean_ci=None, kl_p99=None, top1=None, top1_ci=None)
FACTS = TextFacts(source="heldout", available=81_726, used=20_480, predicted=20_440, windows=40, seqlen=512)
COMPARISON = Comparison(
    rows=(ROW, BASE), reference="base", text=FACTS, dtype="float32", probe_counts={"qa": 200, "copy": 100}
)


def test_the_table() -> None:
    lines = render_comparison(COMPARISON).splitlines()
    assert lines[0].split() == "model size bits/weight perplexity KL mean KL p99 top-1 qa copy time".split()
    assert lines[2].split() == "w4 3.1 MB 4.125 3.55 ±0.15 5.47e-07 ±5e-08 0.0263 94.8% 86% 100% 12 s".split()
    assert lines[3].split() == "base (reference) 3.1 MB 4.125 3.55 ±0.15 - - - 86% 100% 12 s".split()
    assert "20,480 of 81,726 tokens of heldout in 40 windows of 512" in lines[5]
    assert "200 qa, 100 copy" in lines[7]
    begun = replace(COMPARISON, text=replace(FACTS, start="<s>"))
    assert "in 40 windows of 512, each begun with <s>, computed in float32" in render_comparison(begun)


def test_without_reference_and_probes() -> None:
    row = replace(BASE, is_reference=False, probes=None, perplexity_ci=None)
    alone = replace(COMPARISON, rows=(row,), reference=None, probe_counts={}, probes_skipped="not asked")
    text = render_comparison(alone)
    assert text.splitlines()[0].split() == "model size bits/weight perplexity time".split()
    assert "reference" not in text
    assert "±" not in text
    assert text.endswith("probes: not asked")


@pytest.fixture
def arguments(quantized: Path) -> list[str]:
    return ["eval", str(quantized), "--reference", "demo:", "--max-tokens", "600", "--seqlen", "128", "--no-probes"]


def test_the_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    lines = captured.out.splitlines()
    assert sum(line.startswith(("[1/2] ", "[2/2] ")) for line in lines) == 2
    assert sum(line.startswith("demo: (reference)") for line in lines) == 1
    assert "600 of " in captured.out


def test_json(arguments: list[str], quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--json"]) == 0
    records = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    last = records[-1]
    assert last["event"] == "comparison"
    row, reference = last["rows"]
    assert (row["name"], reference["name"]) == (str(quantized), "demo:")
    assert 0 < row["kl_mean"] < 0.1
    assert 0.8 < row["top1"] <= 1
    assert row["size_bytes"] < reference["size_bytes"] / 2
