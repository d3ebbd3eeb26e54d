"""The report, the card and the events: true to the last figure, the same for equal runs, and valid."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import bitwright
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.formats.checksums import verify_files
from bitwright.formats.table import find_format
from bitwright.quantization.api import quantize
from bitwright.quantization.events import Event
from bitwright.quantization.report import Report
from tests.quantization.tiny import TEXT, Plain, digests, file_tensors, save_model

ROOT = Path(__file__).resolve().parents[2]
SCHEMES = ["w4g32", "w3g32-asym", "w8", "nf4g32-dq", "w4a8", "w2g8", "A16W4", "w4g16-axis0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    save_model(folder, "llama", dtype=torch.bfloat16)
    (folder / "text.txt").write_text(TEXT)
    return folder


def reject_constant(text: str) -> None:
    raise AssertionError(f"{text} is not JSON")


def read_report(output: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((output / "report.json").read_text(), parse_constant=reject_constant)
    return record


def weights(model: Path) -> dict[str, Tensor]:
    return {
        name.removesuffix(".weight"): tensor.double() for name, tensor in load_file(model / "model.safetensors").items()
    }


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_figure_is_that_of_a_naive_count(model: Path, tmp_path: Path, scheme: str) -> None:
    report = quantize(model, tmp_path / "out", scheme=scheme, overrides=["lm_head=w8", ".*o_proj=float"])
    checkpoint, floats = open_checkpoint(tmp_path / "out"), weights(model)
    layout = find_format(checkpoint.quantization or {})
    records = layout.layers(checkpoint)
    assert records.keys() == report.layers.keys() and len(records) == 13
    sizes = {name: stored.entry.end - stored.entry.start for name, stored in checkpoint.tensors.items()}
    all_bits = all_weights = 0
    for name, row in report.layers.items():
        decoded = layout.decode(checkpoint, name, records[name]).dequantize().double()
        exact = float((floats[name] - decoded).norm() / floats[name].norm())
        assert math.isclose(row["relative_error"], exact, rel_tol=1e-5), name
        assert row["shape"] == list(floats[name].shape) and row["scheme"] == records[name].scheme.name
        bits = 8 * sum(size for tensor, size in sizes.items() if tensor.startswith(name + "."))
        assert abs(row["bits_per_weight"] - bits / floats[name].numel()) < 1e-4
        all_bits, all_weights = all_bits + bits, all_weights + floats[name].numel()
    assert abs(report.bits_per_weight - all_bits / all_weights) < 2e-4
    assert report.quantized_parameters == all_weights
    assert report.parameters == sum(tensor.numel() for tensor in floats.values())
    assert report.weight_bytes == sum(sizes.values()) == json.loads(index(tmp_path / "out"))["metadata"]["total_size"]
    assert report.source_bytes == 2 * report.parameters
    assert report.worst_layers(1)[0][1] == max(row["relative_error"] for row in report.layers.values())


def index(output: Path) -> str:
    return (output / "model.safetensors.index.json").read_text()


def test_the_file_says_what_the_call_returns(model: Path, tmp_path: Path) -> None:
    report = quantize(model, tmp_path / "out", scheme="w4g32", calibration=model / "text.txt", samples=4, seqlen=16)
    record = read_report(tmp_path / "out")
    assert record == json.loads(json.dumps(report.to_dict()))
    assert record["recipe"] == {"algorithm": "rtn", "options": {}, "overrides": [], "scheme": "w4g32", "seed": 0}
    assert record["versions"]["bitwright"] == bitwright.__version__
    assert record["versions"]["torch"] == torch.__version__ and record["versions"].keys() >= {
        "bitwright",
        "transformers",
    }
    assert record["run"]["seconds"] > 0 and record["run"]["peak_resident_bytes"] > 1 << 20
    assert record["calibration"]["samples"] == 4 and len(record["calibration"]["sha256"]) == 64
    assert record["blocks"].keys() == {"model.layers.0", "model.layers.1"}
    rebuilt = Report(**record)
    assert rebuilt.worst_layers() == report.worst_layers()


def test_weighted_errors_are_those_of_the_activations(model: Path, tmp_path: Path) -> None:
    """With the power of each input channel as weight; recomputed for the first block, whose inputs are known."""
    from transformers import AutoModelForCausalLM

    from bitwright.models.hf import load_tokenizer
    from bitwright.quantization.calibration import cut_windows, tokenize

    report = quantize(model, tmp_path / "out", scheme="w3g32", calibration=model / "text.txt", samples=4, seqlen=16)
    ids = cut_windows(tokenize(load_tokenizer(model), TEXT), samples=4, seqlen=16, seed=0, source="").windows
    original = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
    power = torch.zeros(32, dtype=torch.float64)

    def look(_: object, inputs: tuple[Tensor, ...]) -> None:
        power.add_(inputs[0].double().flatten(0, -2).square().sum(0))

    original.model.layers[0].self_attn.q_proj.register_forward_pre_hook(look)
    with torch.no_grad():
        for window in ids:
            original(window[None])
    name = "model.layers.0.self_attn.q_proj"
    checkpoint = open_checkpoint(tmp_path / "out")
    layout = find_format(checkpoint.quantization or {})
    decoded = layout.decode(checkpoint, name, layout.layers(checkpoint)[name]).dequantize().double()
    exact = weights(model)[name]
    expected = (((exact - decoded).square() * power).sum() / (exact.square() * power).sum()).sqrt()
    assert math.isclose(report.layers[name]["weighted_error"], float(expected), rel_tol=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e-20, 1e-8, 1e8, 1e20, 1e30])
def test_errors_of_tiny_and_huge_weights_are_numbers(tmp_path: Path, size: float) -> None:
    model = Plain(32, blocks=1)
    with torch.no_grad():
        model.blocks[0].up.weight.mul_(size)
    report = quantize(model, tmp_path / "out", scheme="w4g32-sf32")
    record = read_report(tmp_path / "out")
    error = record["layers"]["blocks.0.up"]["relative_error"]
    plain = Plain(32, blocks=1)
    reference = quantize(plain, tmp_path / "plain", scheme="w4g32-sf32").layers["blocks.0.up"]["relative_error"]
    assert math.isclose(error, reference, rel_tol=0.02), report.layers
    assert math.isclose(error, record["layers"]["blocks.0.up"]["relative_error"])


def test_zero_weights_have_no_error(tmp_path: Path) -> None:
    model = Plain(32, blocks=1)
    with torch.no_grad():
        model.blocks[0].up.weight.zero_()
    report = quantize(model, tmp_path / "out", scheme="w4g32")
    assert report.layers["blocks.0.up"]["relative_error"] == 0.0
    read_report(tmp_path / "out")


def test_the_card_tells_the_same_and_no_times(model: Path, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"scheme": "w4g32", "calibration": model / "text.txt", "samples": 4, "seqlen": 16}
    report = quantize(model, tmp_path / "out", overrides=["lm_head=w8", ".*o_proj=float"], **arguments)
    card = (tmp_path / "out/README.md").read_text()
    assert card.startswith("---\n") and card.count("\n---\n") == 1
    for text in (
        f"{report.bits_per_weight:.3f}", report.format, "4 samples of 16 tokens", "`lm_head` → w8", "o_proj",
        "bitwright.load", report.worst_layers(1)[0][0], model.name,
    ):  # fmt: skip
        assert text in card, text
    for fact in (str(report.run["seconds"]), str(report.run["peak_resident_bytes"]), report.run["date"], "seconds"):
        assert fact not in card
    quantize(model, tmp_path / "again", overrides=["lm_head=w8", ".*o_proj=float"], **arguments)
    assert (tmp_path / "again/README.md").read_text() == card


def test_the_checksums_hold(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "out", scheme="w4g32", overrides=["lm_head=w8"])
    listed = verify_files(tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").glob("*.safetensors")} | {"config.json"} <= set(listed)


def test_events_tell_the_whole_story(model: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    quantize(model, tmp_path / "out", scheme="w4g32", overrides=["lm_head=w8"], on_event=events.append)
    kinds = [event.kind for event in events]
    assert kinds[0] == "plan" and kinds[-1] == "result" and kinds.count("unit") == 4
    plan = events[0].data
    assert plan["layers"] == 15 and plan["blocks"] == 2 and plan["left_float"] == 0 and plan["format"]
    assert plan["overrides"] == {"w8-sbf16 by rtn": ["lm_head"]}
    assert plan["output_bytes"] > 0 and plan["peak_bytes"] > 0 and plan["free_disk_bytes"] > 0 and "seconds" in plan
    units = [event.data for event in events if event.kind == "unit"]
    assert [unit["done"] for unit in units] == [1, 2, 3, 4] and {unit["total"] for unit in units} == {4}
    assert all(unit["seconds"] >= 0 for unit in units)
    assert units[0]["eta_seconds"] is None, "the embeddings say nothing of the blocks"
    assert all(unit["eta_seconds"] >= 0 for unit in units[1:])
    assert units[-1]["eta_seconds"] == 0 and units[0]["error"] is None and units[1]["error"] > 0
    for event in events:
        assert event.message
        json.dumps(event.data, allow_nan=False)
    assert events[-1].data == read_report(tmp_path / "out") | {
        "unquantized": events[-1].data["unquantized"],
        "notices": events[-1].data["notices"],
    }


TWICE = """
import sys
from bitwright.quantization.api import quantize
model, output, threads = sys.argv[1:]
quantize(model, output, scheme="w4g32-asym", overrides=["lm_head=w3g16"], threads=int(threads))
"""


def test_two_processes_write_the_same_bytes_with_any_number_of_threads(model: Path, tmp_path: Path) -> None:
    """With other hash seeds too; what the number of threads may change is the last digit of a reported error."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")}
    for name, threads, hashing in (("a", "1", "1"), ("b", "2", "2")):
        command = [sys.executable, "-c", TWICE, str(model), str(tmp_path / name), threads]
        subprocess.run(command, check=True, env=environment | {"PYTHONHASHSEED": hashing}, capture_output=True)
    quantize(model, tmp_path / "c", scheme="w4g32-asym", overrides=["lm_head=w3g16"], threads=1)
    a, b, c = (digests(tmp_path / name) for name in "abc")
    assert a == c
    assert {name for name in a if a[name] != b[name]} <= {"report.json", "README.md"}
    left, right = file_tensors(tmp_path / "a"), file_tensors(tmp_path / "b")
    assert all(torch.equal(left[name], right[name]) for name in left)
