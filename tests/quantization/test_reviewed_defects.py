"""Defects that a review found, each with the input that showed it."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

import bitwright
from bitwright.cli import main
from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import CONFIG, INDEX
from bitwright.formats.checksums import verify_files
from bitwright.models.hf import _parameters_on_meta, load_tokenizer
from bitwright.quantization.api import quantize
from bitwright.quantization.calibration import tokenize
from bitwright.quantization.events import Stopped
from tests.quantization.tiny import TEXT, Plain, build_model, save_model


def test_a_model_in_memory_may_have_scalars(tmp_path: Path) -> None:
    model = Plain()
    model.register_buffer("steps", torch.tensor(3))
    bitwright.quantize(model, tmp_path / "out", scheme="w4g32")
    assert json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]["steps"]


def test_a_model_that_was_trained_runs_with_8_bit_activations() -> None:
    model = bitwright.quantize_module(build_model(), scheme="w8a8")
    assert any(parameter.requires_grad for parameter in model.parameters())
    assert torch.isfinite(model(input_ids=torch.tensor([[1, 2, 3]])).logits).all()


def test_the_model_card_has_valid_metadata(tmp_path: Path) -> None:
    bitwright.quantize("demo:", tmp_path / "out", scheme="w4g128")
    _, metadata, _ = (tmp_path / "out" / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(metadata)["base_model"] == "demo:"


def test_what_tokenizer_json_says_of_cutting_does_not_cut_texts(tmp_path: Path) -> None:
    save_model(tmp_path)
    whole = tokenize(load_tokenizer(tmp_path), TEXT)
    path = tmp_path / "tokenizer.json"
    cutting = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation": cutting}))
    assert torch.equal(tokenize(load_tokenizer(tmp_path), TEXT), whole)
    assert len(whole) > 1000


def test_a_check_that_nobody_asked_for_does_not_fail_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_model(tmp_path / "in", tokenizer=False)
    arguments = ["quantize", str(tmp_path / "in"), "--scheme", "w4g32", "-o"]
    assert main([*arguments, str(tmp_path / "out")]) == 0
    assert "notice: perplexity was not measured: " in capsys.readouterr().out
    assert main([*arguments, str(tmp_path / "asked"), "--check"]) != 0


def test_the_checksums_are_of_every_file_but_the_report(tmp_path: Path) -> None:
    save_model(tmp_path / "in")
    bitwright.quantize(tmp_path / "in", tmp_path / "out", scheme="w4g32")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {CONFIG, INDEX, "tokenizer.json"} <= names
    assert set(verify_files(tmp_path / "out")) == names - {"report.json", "README.md", "bitwright_files.json"}


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_work_directory_that_is_a_link_is_not_followed(overwrite: bool, tmp_path: Path) -> None:
    precious, output = tmp_path / "precious", tmp_path / "out"
    precious.mkdir()
    (precious / "journal.jsonl").write_text("{}\n")
    output.mkdir()
    (output / ".bitwright").symlink_to(precious)
    with pytest.raises(bitwright.BitwrightError, match=r"BW203.*is a link"):
        bitwright.quantize(Plain(), output, scheme="w4g32", overwrite=overwrite)
    assert [path.name for path in precious.iterdir()] == ["journal.jsonl"]


def test_a_scheme_that_is_no_name_is_refused() -> None:
    with pytest.raises(bitwright.BitwrightError, match=r"BW202.*a scheme is a name, not 4"):
        bitwright.parse(4)  # type: ignore[arg-type]


def test_models_built_in_two_threads_leave_torch_as_it_was() -> None:
    register = nn.Module.register_parameter
    inside, done = threading.Event(), threading.Event()

    def build() -> None:
        with _parameters_on_meta():
            inside.set()
            done.wait(10)

    first, second = threading.Thread(target=build), threading.Thread(target=build)
    first.start()
    inside.wait(10)
    assert nn.Linear(2, 2).weight.device.type == "cpu"  # another thread's layers are its own
    second.start()
    done.set()
    first.join(10)
    second.join(10)
    assert nn.Module.register_parameter is register


def test_the_call_that_resumes_has_every_argument_that_matters(tmp_path: Path) -> None:
    """What an unfinished directory tells people to run must not be refused for other settings."""
    output = tmp_path / "out"
    arguments = {"scheme": "w4g32", "overrides": (".*down_proj=w8",), "seed": 3}
    with pytest.raises(Stopped):
        quantize("demo:", output, **arguments, should_stop=lambda: True)
    with pytest.raises(BitwrightError) as caught:
        quantize("demo:", output, scheme="w3g32")
    assert caught.value.code == "BW207"
    call = f"bitwright.quantize('demo:', {str(output)!r}, scheme='w4g32', overrides=('.*down_proj=w8',), seed=3)"
    assert call in caught.value.suggestion


def test_overrides_that_are_one_text_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BitwrightError) as caught:
        quantize("demo:", tmp_path / "out", overrides="lm_head=w8")
    assert caught.value.code == "BW201" and "['lm_head=w8']" in caught.value.suggestion
