"""``save_pretrained`` of a quantized model: what is written is read again, to the last bit."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import bitwright
from bitwright.core.errors import BitwrightError
from bitwright.core.scheme_names import parse
from bitwright.formats.checksums import verify_files
from bitwright.models import saving
from bitwright.models.loading import load
from bitwright.models.saving import save
from tests.models.checkpoints import ARCHITECTURES, VOCABULARY, save_float, save_quantized
from tests.models.test_loading import block_linears

TOKENS = torch.arange(40).view(2, 20) * 7 % VOCABULARY


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=TOKENS).logits
    return output


def tensors_of(directory: Path) -> dict[str, Tensor]:
    return {name: tensor for path in directory.glob("*.safetensors") for name, tensor in load_file(path).items()}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize(("format", "scheme"), [("native", "nf4g8-dq"), ("compressed-tensors", "w4g8-asym")])
def test_a_loaded_model_is_saved_as_it_was(architecture: str, format: str, scheme: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[architecture]().to(torch.bfloat16).eval()
    if architecture == "gpt2" and format != "native":
        return  # its layers are not Linear
    save_quantized(model, tmp_path / "a", {name: parse(scheme) for name in block_linears(model)}, format=format)
    loaded = load(tmp_path / "a")
    loaded.save_pretrained(tmp_path / "b")
    before, after = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) and before[name].dtype == after[name].dtype for name in before)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("a", "b")]
    assert configs[0]["quantization_config"]["quant_method"] == configs[1]["quantization_config"]["quant_method"]
    again = load(tmp_path / "b")
    assert again.dtype == loaded.dtype and torch.equal(logits(again), logits(loaded))
    assert len(verify_files(tmp_path / "b")) >= 3


@pytest.mark.parametrize("scheme", ["w4g8", "w8", "A8W8"])
def test_a_module_quantized_in_memory_is_saved(scheme: str, tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"]().eval()
    quantized = bitwright.quantize_module(model, scheme=scheme, overrides=["lm_head=w8"])
    for number, each in enumerate((quantized, copy.deepcopy(quantized))):
        each.save_pretrained(tmp_path / str(number))  # type: ignore[operator]
        found = load(tmp_path / str(number))
        assert torch.equal(logits(found), logits(quantized)) and not found.config.tie_word_embeddings
    with pytest.raises(BitwrightError, match="BW203"):
        quantized.save_pretrained(tmp_path / "0")  # type: ignore[operator]


def test_transformers_reads_what_is_saved_in_the_other_format(tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    from transformers import AutoModelForCausalLM

    quantized = bitwright.quantize_module(ARCHITECTURES["llama"]().eval(), scheme="w4g32")
    save(quantized, tmp_path, format="compressed-tensors")
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(other), logits(quantized), rtol=1e-4, atol=1e-4)


def test_large_models_are_saved_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "SHARD_BYTES", 20_000)
    quantized = bitwright.quantize_module(ARCHITECTURES["qwen2"]().eval(), scheme="w3g8")
    quantized.save_pretrained(tmp_path)  # type: ignore[operator]
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert torch.equal(logits(load(tmp_path)), logits(quantized))


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BitwrightError, match=r"BW201.*quantized layers"):
        save(ARCHITECTURES["llama"](), tmp_path / "out")
    quantized = bitwright.quantize_module(ARCHITECTURES["llama"]().eval(), scheme="nf4g8")
    with pytest.raises(BitwrightError, match="BW205"):
        save(quantized, tmp_path / "out", format="compressed-tensors")
    assert not (tmp_path / "out").exists()
    with pytest.raises(TypeError, match="max_shard_size"):
        quantized.save_pretrained(tmp_path / "out", max_shard_size="1GB")  # type: ignore[operator]
    save_float(ARCHITECTURES["llama"](), tmp_path / "float")
    assert "save_pretrained" not in load(tmp_path / "float").__dict__  # a float model is saved as ever
