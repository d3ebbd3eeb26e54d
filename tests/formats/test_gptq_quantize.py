"""From ``quantize --format gptq`` (or awq) to a running model, and back to the bytes it came from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from bitwright.cli.inspection import inspect
from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.formats.table import find_format
from bitwright.models.loading import load
from bitwright.models.quantized import QuantizedLinear
from bitwright.quantization.api import quantize
from tests.models.checkpoints import ARCHITECTURES, VOCABULARY, save_float

TOKENS = torch.arange(40).view(2, 20) * 7 % VOCABULARY


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(4)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=320, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    return save_float(LlamaForCausalLM(config), tmp_path_factory.mktemp("float"))


def test_a_layer_that_does_not_fill_whole_words_is_named(tmp_path: Path) -> None:
    folder = save_float(ARCHITECTURES["llama-untied"](), tmp_path / "float")
    words = r"(?s)BW205.*lm_head: the shape must be of multiples of 32, not 300 x 64"
    with pytest.raises(BitwrightError, match=words):
        quantize(folder, tmp_path / "out", scheme="w4g32", format="gptq", overrides=("lm_head=w4g32",))


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=TOKENS).logits
    return output


def stored(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize(
    ("format", "scheme", "overrides"),
    [
        ("gptq", "w4g32", ()), ("gptq", "w3g32-asym", ()), ("gptq", "w8", ()), ("gptq_v1", "w4g32-asym", ()),
        ("gptq", "w4g32", (".*q_proj=w8", "model.layers.1.mlp.down_proj=float")), ("gptq", "w4g32", ("lm_head=w8",)),
        ("gptq_v2", "w4g32", (".*q_proj=w4g32-asym",)), ("awq", "w4g32-asym", ()),
        ("awq", "w4g32", ("model.layers.1.mlp.down_proj=float",)),
    ],
)  # fmt: skip
def test_what_is_written_runs_and_is_written_again_byte_for_byte(
    tmp_path: Path, source: Path, format: str, scheme: str, overrides: tuple[str, ...]
) -> None:
    """The layers of the running model still hold the integers, and the scales, of the file."""
    output = tmp_path / "out"
    quantize(source, output, scheme=scheme, algorithm="rtn", format=format, overrides=overrides)
    checkpoint, tensors = open_checkpoint(output), stored(output)
    found = find_format(checkpoint.quantization or {})
    assert inspect(output).format == found.name
    native = tmp_path / "native"
    quantize(source, native, scheme=scheme, algorithm="rtn", format="native", overrides=overrides)
    model = load(output)
    assert torch.equal(logits(model), logits(load(native)))
    written: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            written |= found.encode(name, module.unpack(), module.scheme)
    assert written and all(torch.equal(tensor, tensors[name]) for name, tensor in written.items())
    endings = (".qweight", ".qzeros", ".scales", ".g_idx")
    assert set(written) == {name for name in tensors if name.endswith(endings)}


@pytest.mark.parametrize("format", ["gptq", "gptq_v1", "gptq_v2", "awq"])
def test_saving_the_loaded_model_gives_the_same_checkpoint(tmp_path: Path, source: Path, format: str) -> None:
    scheme = "w4g32" if format == "gptq_v2" else "w4g32-asym"
    left = "model.layers.0.mlp.up_proj=float"
    quantize(source, tmp_path / "first", scheme=scheme, algorithm="rtn", format=format, overrides=(left,))
    if format != "awq":
        move_columns(tmp_path / "first", "model.layers.1.mlp.down_proj")
    model: Any = load(tmp_path / "first")
    model.save_pretrained(tmp_path / "second")
    first, second = stored(tmp_path / "first"), stored(tmp_path / "second")
    assert set(first) == set(second)
    assert all(first[name].dtype == second[name].dtype and torch.equal(first[name], second[name]) for name in first)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("first", "second")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def move_columns(folder: Path, name: str) -> None:
    """Put the columns of a layer of groups of 32 into other groups, as an activation order does."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        if f"{name}.g_idx" in tensors:
            columns = tensors[f"{name}.g_idx"].numel()
            tensors[f"{name}.g_idx"] = torch.arange(columns, dtype=torch.int32) * 7 % columns // 32
            save_file(tensors, path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("format", "scheme", "overrides", "words"),
    [
        ("gptq", "nf4g32", (), "gptq format.*q_proj: it has no nf4"), ("gptq", "w5", (), "bits, not 5"),
        ("gptq", "A16W4", (), "not floats"), ("awq", "w8", (), "awq format.*4 bits, not 8"),
        ("awq", "w4g32", (".*q_proj=w4g16",), "one setting"), ("gptq", "w4g32", (".*q_proj=w4g32-asym",), "gptq_v2"),
        ("awq", "w4g32", ("lm_head=w4g32",), "lm_head in floating point"),
        ("gptq", "w8a8", (), "activations"), ("gptq", "w4g32-sbf16", (), "float16"),
    ],
)  # fmt: skip
def test_what_a_format_cannot_store_is_refused_before_any_work(
    tmp_path: Path, source: Path, format: str, scheme: str, overrides: tuple[str, ...], words: str
) -> None:
    arguments: dict[str, Any] = {"scheme": scheme, "algorithm": "rtn", "format": format, "overrides": overrides}
    with pytest.raises(BitwrightError, match=f"(?s)BW205.*{words}"):
        quantize(source, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()


def test_layers_left_float_are_named(tmp_path: Path, source: Path) -> None:
    """W42."""
    left = "model.layers.0.mlp.down_proj"
    arguments: dict[str, Any] = {"scheme": "w4g32", "algorithm": "rtn", "overrides": (f"{left}=float",)}
    for format in ("gptq", "awq"):
        output = tmp_path / format
        quantize(source, output, format=format, **arguments)
        quantization = json.loads((output / "config.json").read_text())["quantization_config"]
        named = quantization.get("modules_to_not_convert", quantization.get("dynamic"))
        assert any(left.replace(".", separator) in name for name in named for separator in (".", r"\."))
        assert isinstance(load(output).get_submodule(left), torch.nn.Linear)
        assert f"in the {format} format: GPTQModel loads it" in (output / "README.md").read_text()


def test_nothing_is_chosen_that_was_not_asked_for(tmp_path: Path, source: Path) -> None:
    report = quantize(source, tmp_path / "out", scheme="w4g32-asym", algorithm="rtn")
    assert report.format == "compressed-tensors"
