"""Calibration text: what is read, how it is cut, and what is said when it does not do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from bitwright.core.errors import BitwrightError
from bitwright.models.embedded_model import read_text
from bitwright.models.hf import load_tokenizer
from bitwright.quantization.api import quantize
from bitwright.quantization.calibration import (
    DEFAULT_SEQLEN,
    FEW_SAMPLES,
    cut_windows,
    read_calibration_text,
    tokenize,
    window_length,
)
from bitwright.quantization.events import Event, Stopped
from tests.quantization.tiny import ALPHABET, TEXT, build_model, digests, rewrite_tensors, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calibration")
    save_model(folder, "llama")
    (folder / "text.txt").write_text(TEXT)
    return folder


def refused(call: Callable[[], object]) -> BitwrightError:
    with pytest.raises(BitwrightError) as caught:
        call()
    return caught.value


def test_windows_are_whole_drawn_once_and_in_text_order() -> None:
    ids = torch.arange(1003)
    for seed in range(5):
        tokens = cut_windows(ids, samples=20, seqlen=10, seed=seed, source="numbers")
        assert tokens.windows.shape == (20, 10) and tokens.available == 100 and tokens.windows.dtype == torch.int64
        starts = tokens.windows[:, 0]
        assert torch.equal(tokens.windows, starts[:, None] + torch.arange(10))
        assert bool((starts % 10 == 0).all()) and bool((starts.diff() > 0).all())
    again = cut_windows(ids, samples=20, seqlen=10, seed=4, source="numbers")
    assert torch.equal(again.windows, tokens.windows) and again.fingerprint() == tokens.fingerprint()
    other = cut_windows(ids, samples=20, seqlen=10, seed=5, source="numbers")
    assert other.fingerprint() != tokens.fingerprint()
    every = cut_windows(ids, samples=500, seqlen=10, seed=0, source="numbers")
    assert torch.equal(every.windows.flatten(), torch.arange(1000))


def test_the_fingerprint_knows_how_equal_tokens_are_cut() -> None:
    ids = torch.arange(64)
    cuts = [cut_windows(ids, samples=64 // length, seqlen=length, seed=0, source="x") for length in (8, 16, 32)]
    assert len({cut.fingerprint() for cut in cuts}) == 3


@pytest.mark.parametrize(("length", "count"), [(0, 0), (1, 1), (15, 15)])
def test_a_text_too_short_for_one_sample_says_what_there_is(length: int, count: int) -> None:
    error = refused(lambda: cut_windows(torch.arange(length), samples=4, seqlen=16, seed=0, source="notes.txt"))
    assert error.code == "BW401" and error.exit_status == 4
    assert f"{count} tokens" in error.what and "16" in error.what and "notes.txt" in error.what
    assert "asked: 4" in error.why and "found: 0" in error.why
    assert ("--seqlen 15" in error.suggestion) == (length == 15)


def test_texts_come_from_files_and_from_the_package(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words and words, ünïcödé 漢字\n", encoding="utf-8")
    assert read_calibration_text(tmp_path / "a.txt") == "words and words, ünïcödé 漢字\n"
    for name in ("calibration", "heldout"):
        assert read_calibration_text(name) == read_text(name)


@pytest.mark.parametrize("data", [b"", b" \n\t\n ", b"\xff\xfe\x00w", b"caf\xe9"])
def test_files_without_text_are_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "odd.txt").write_bytes(data)
    error = refused(lambda: read_calibration_text(tmp_path / "odd.txt"))
    assert error.code == "BW401" and "odd.txt" in error.what


@pytest.mark.parametrize("name", ["pile", "calibration.txt", "", ".", "x" * 5000, "a\0b", "/nowhere/text.txt"])
def test_unknown_texts_are_refused_with_what_is_known(name: str) -> None:
    error = refused(lambda: read_calibration_text(name))
    assert error.code == "BW402" and "calibration, heldout" in error.suggestion


def test_tokens_are_those_of_the_text_alone(model: Path) -> None:
    tokenizer = load_tokenizer(model)
    ids = tokenize(tokenizer, "ab z?\n")
    expected = [ALPHABET.index(character) if character in ALPHABET else len(ALPHABET) for character in "ab z?\n"]
    assert ids.tolist() == expected and ids.dtype == torch.int64
    assert len(tokenize(tokenizer, TEXT * 20)) == len(TEXT) * 20  # longer than any context, without a warning


def test_the_embedded_text_calibrates_the_embedded_model(tmp_path: Path) -> None:
    report = quantize("demo:", tmp_path / "out", scheme="w3g32", calibration="calibration", samples=4, seqlen=32)
    assert report.calibration is not None and report.calibration["source"] == "calibration"
    assert all(0 < error < 1 for error in report.blocks.values()) and len(report.blocks) >= 2
    for row in report.layers.values():
        assert 0 < row["weighted_error"] < 1


def run(model: Path, output: Path, **changes: Any) -> Any:
    arguments = {"scheme": "w4g32", "calibration": model / "text.txt", "samples": 2, "seqlen": 8}
    return quantize(model, output, **(arguments | changes))


def test_impossible_numbers_are_refused_before_anything_is_made(model: Path, tmp_path: Path) -> None:
    for change in ({"samples": 0}, {"samples": 2.5}, {"seqlen": 1}, {"seqlen": "8"}, {"threads": 0}, {"seed": -1}):
        error = refused(lambda change=change: run(model, tmp_path / "out", **change))
        assert error.code == "BW201" and next(iter(change)) in error.what
    error = refused(lambda: run(model, tmp_path / "out", seqlen=129))
    assert error.code == "BW201" and "129" in error.what and "128" in error.what
    error = refused(lambda: run(model, tmp_path / "out", calibration=tmp_path / "missing.txt"))
    assert error.code == "BW402"
    (tmp_path / "short.txt").write_text("too short")
    error = refused(lambda: run(model, tmp_path / "out", calibration=tmp_path / "short.txt", seqlen=32))
    assert error.code == "BW401" and "9 tokens" in error.what
    assert not (tmp_path / "out").exists()


def test_the_default_length_is_the_context_where_that_is_shorter(model: Path, tmp_path: Path) -> None:
    report = run(model, tmp_path / "out", seqlen=None)
    assert report.calibration["seqlen"] == 128 < DEFAULT_SEQLEN


def test_few_samples_are_told_and_recorded(model: Path, tmp_path: Path) -> None:
    events: list[Event] = []
    report = run(model, tmp_path / "few", samples=3, on_event=events.append)
    (notice,) = report.notices
    assert "only 3 calibration samples" in notice and str(FEW_SAMPLES) in notice
    assert notice in [event.message for event in events if event.kind == "notice"]
    assert notice in (tmp_path / "few/README.md").read_text()
    report = run(model, tmp_path / "short", samples=9999, seqlen=64)
    assert f"{len(TEXT) // 64} calibration samples instead of 9999" in report.notices[0]
    assert run(model, tmp_path / "enough", samples=FEW_SAMPLES).notices == ()


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama", vocab_size=16)
    (tmp_path / "model/text.txt").write_text(TEXT)
    error = refused(lambda: run(tmp_path / "model", tmp_path / "out"))
    assert error.code == "BW312" and "16" in error.what and "31" in error.what
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_tokenizer_is_refused_only_if_it_is_needed(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama", tokenizer=False)
    (tmp_path / "model/text.txt").write_text(TEXT)
    assert refused(lambda: run(tmp_path / "model", tmp_path / "out")).code == "BW312"
    run(tmp_path / "model", tmp_path / "out", calibration=None)


def break_for(directory: Path, token: str, **fields: Any) -> None:
    """Save a float16 model in which one character overflows at the end of the first block."""
    model = save_model(directory, "llama", dtype=torch.float16, **fields)
    embedding = model.get_input_embeddings().weight.detach().clone()
    embedding[ALPHABET.index(token)] = torch.finfo(torch.float16).max
    name = "model.layers.0.mlp.down_proj.weight"
    down = model.get_parameter(name).detach() * 1000
    rewrite_tensors(directory, {"model.embed_tokens.weight": embedding, name: down})


def test_a_sample_that_makes_nan_is_named_or_left_out(tmp_path: Path) -> None:
    break_for(tmp_path / "model", "z")
    (tmp_path / "model/text.txt").write_text("a" * 16 + "azazazaz" + "b" * 16)
    arguments = {"samples": 5, "seqlen": 8}
    error = refused(lambda: run(tmp_path / "model", tmp_path / "out", **arguments))
    assert error.code == "BW601" and error.exit_status == 6
    assert "sample 2" in error.what and "model.layers.0" in error.what
    events: list[Event] = []
    report = run(tmp_path / "model", tmp_path / "out", on_nonfinite="drop-sample", on_event=events.append, **arguments)
    assert report.calibration["dropped"] == [2]
    assert any("sample 2 is left out" in event.message for event in events)
    # What is left is what those four samples alone would give.
    (tmp_path / "model/text.txt").write_text("a" * 16 + "b" * 16)
    alone = run(tmp_path / "model", tmp_path / "alone", samples=4, seqlen=8)
    assert alone.layers == report.layers and alone.blocks == report.blocks


def test_a_dropped_sample_stays_dropped_after_a_resumption(tmp_path: Path) -> None:
    break_for(tmp_path / "model", "z", num_hidden_layers=3)
    (tmp_path / "model/text.txt").write_text("a" * 16 + "azazazaz" + "b" * 16)
    arguments = {"samples": 5, "seqlen": 8, "on_nonfinite": "drop-sample"}
    run(tmp_path / "model", tmp_path / "whole", **arguments)
    while True:
        try:
            report = run(tmp_path / "model", tmp_path / "out", should_stop=lambda: True, **arguments)
            break
        except Stopped:
            continue
    assert report.calibration["dropped"] == [2]
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_a_sample_that_overflows_before_the_blocks_is_named_or_left_out(tmp_path: Path) -> None:
    """Gemma multiplies its embeddings by the root of their width."""
    model = save_model(tmp_path / "model", "gemma")
    embedding = model.get_input_embeddings().weight.detach().clone()
    embedding[ALPHABET.index("z")] = 3e38
    rewrite_tensors(tmp_path / "model", {"model.embed_tokens.weight": embedding})
    (tmp_path / "model/text.txt").write_text("z" * 8 + "a" * 16)
    error = refused(lambda: run(tmp_path / "model", tmp_path / "out", samples=3))
    assert error.code == "BW601" and "sample 0" in error.what
    report = run(tmp_path / "model", tmp_path / "out", samples=3, on_nonfinite="drop-sample")
    assert report.calibration["dropped"] == [0]


def test_when_every_sample_makes_nan_nothing_is_left_to_drop(tmp_path: Path) -> None:
    break_for(tmp_path / "model", "z")
    (tmp_path / "model/text.txt").write_text("z" * 40)
    error = refused(lambda: run(tmp_path / "model", tmp_path / "out", on_nonfinite="drop-sample"))
    assert error.code == "BW601"
    assert refused(lambda: run(tmp_path / "model", tmp_path / "out", on_nonfinite="hope")).code == "BW201"


def test_a_module_in_memory_is_calibrated_through_prepare_alone(tmp_path: Path) -> None:
    error = refused(lambda: quantize(build_model(), tmp_path / "out", scheme="w4g32", calibration="heldout"))
    assert error.code == "BW401" and "prepare" in error.suggestion and not (tmp_path / "out").exists()


def test_windows_beyond_the_context_are_a_usage_error_with_the_length_that_fits() -> None:
    assert window_length(None, 64) == 64 and window_length(None, None) == DEFAULT_SEQLEN and window_length(8, 64) == 8
    error = refused(lambda: window_length(65, 64))
    assert error.code == "BW201" and error.suggestion == "--seqlen 64"
    error = refused(lambda: quantize("demo:", "unused", scheme="w4g32", calibration="calibration", seqlen=9999))
    assert error.code == "BW201" and error.suggestion == "--seqlen 512"
