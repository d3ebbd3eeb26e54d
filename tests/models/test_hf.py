"""What is taken from transformers: configurations read with care, models without memory, tokenizers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.models.hf import context_length, empty_model, load_tokenizer, read_config
from tests.quantization.tiny import FAMILIES, build_model, save_model


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    save_model(tmp_path, "llama")
    return tmp_path


def edit(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not ...}))


def refused(directory: Path) -> BitwrightError:
    with pytest.raises(BitwrightError) as caught:
        empty_model(read_config(open_checkpoint(directory)))
    return caught.value


@pytest.mark.parametrize("family", FAMILIES)
def test_an_empty_model_has_the_shape_of_the_real_one_and_real_buffers(family: str) -> None:
    real = build_model(family, dtype=torch.bfloat16)
    real.config.dtype = torch.bfloat16
    empty = empty_model(real.config)
    assert not empty.training
    parameters, expected = dict(empty.named_parameters()), dict(real.named_parameters())
    assert parameters.keys() == expected.keys()
    for name, parameter in parameters.items():
        assert parameter.is_meta and parameter.shape == expected[name].shape, name
        assert parameter.dtype == expected[name].dtype, name
    buffers, wanted = dict(empty.named_buffers()), dict(real.named_buffers())
    assert buffers.keys() == wanted.keys()
    for name, buffer in buffers.items():
        assert not buffer.is_meta and torch.equal(buffer, wanted[name]), name


def test_layers_that_others_build_meanwhile_are_theirs() -> None:
    empty_model(build_model("llama").config)
    assert not nn.Linear(3, 3).weight.is_meta


def test_a_failure_leaves_torch_as_it_was(directory: Path) -> None:
    register = nn.Module.register_parameter
    edit(directory, hidden_act="no such function")
    assert refused(directory).code == "BW307"
    assert nn.Module.register_parameter is register


@pytest.mark.parametrize("kind", ["lama", "bert2", "", None, 7])
def test_unknown_model_types_name_what_is_near(directory: Path, kind: Any) -> None:
    edit(directory, model_type=kind)
    error = refused(directory)
    assert error.code == "BW306" and repr(kind) in error.what and "config.json" in error.where
    assert kind != "lama" or "llama" in error.suggestion


def test_code_in_the_directory_is_never_run(directory: Path) -> None:
    bomb = directory / "modeling_bomb.py"
    bomb.write_text("open('ran', 'w')\nraise SystemExit('it ran')\n")
    auto_map = {"AutoConfig": "modeling_bomb.Config", "AutoModelForCausalLM": "modeling_bomb.Model"}
    edit(directory, auto_map=auto_map)
    empty_model(read_config(open_checkpoint(directory)))  # a known type does not need it
    edit(directory, model_type="bomb")
    error = refused(directory)
    assert error.code == "BW306" and "auto_map" in error.why
    tokenizer = json.loads((directory / "tokenizer_config.json").read_text())
    tokenizer |= {"auto_map": {"AutoTokenizer": ["modeling_bomb.Tokenizer", None]}}
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    edit(directory, model_type="llama")
    try:
        load_tokenizer(directory)
    except BitwrightError as caught:
        assert caught.code == "BW312"
    assert not (directory / "ran").exists() and not Path("ran").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": "32"},
        {"hidden_size": -32},
        {"hidden_size": 0},
        {"hidden_size": 1 << 40},
        {"vocab_size": 3.5},
        {"num_hidden_layers": True},
        {"num_hidden_layers": 1000},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5, "head_dim": ...},
        {"num_key_value_heads": 0},
        {"num_key_value_heads": 3},
        {"hidden_act": 3},
        {"rope_parameters": {"rope_type": "spiral"}},
        {"rope_parameters": "none"},
        {"dtype": "float33"},
        {"rms_norm_eps": "small"},
    ],
)
def test_nonsense_in_a_configuration_is_named(directory: Path, changes: dict[str, Any]) -> None:
    edit(directory, **changes)
    try:
        empty_model(read_config(open_checkpoint(directory)))
    except BitwrightError as error:
        assert error.code == "BW307" and error.exit_status == 3
        field = next(iter(changes))
        known = ("hidden_act", "rope_parameters", "dtype", "rms_norm_eps", "num_hidden_layers")
        assert field in error.what or field in known, error.render()
    else:
        assert next(iter(changes)) in ("rope_parameters", "rms_norm_eps", "dtype"), "this must not pass"


def test_every_contradiction_is_told_at_once(directory: Path) -> None:
    edit(directory, hidden_size="x", vocab_size=-1)
    error = refused(directory)
    assert "hidden_size is 'x'" in error.what and "vocab_size is -1" in error.what


def test_an_old_quantization_record_does_not_reach_transformers(directory: Path) -> None:
    edit(directory, quantization_config={"quant_method": "bitwright", "version": 1})
    assert not hasattr(read_config(open_checkpoint(directory)), "quantization_config")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_context_is_known_for_every_family(family: str) -> None:
    expected = None if family == "bloom" else 128
    assert context_length(build_model(family).config) in (expected, 2048 if family == "falcon" else expected)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": "1.0"}', '{"model": {"type": "Unheard"}}'])
def test_broken_tokenizers_are_one_error(directory: Path, text: str) -> None:
    (directory / "tokenizer.json").write_text(text)
    with pytest.raises(BitwrightError) as caught:
        load_tokenizer(directory)
    assert caught.value.code == "BW312" and str(directory) in caught.value.where


def test_a_missing_tokenizer_is_told(directory: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(BitwrightError) as caught:
        load_tokenizer(directory)
    assert caught.value.code == "BW312" and "tokenizer.json" in caught.value.suggestion
