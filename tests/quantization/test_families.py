"""Every family that is promised: quantized, stored, loaded again, and equal to its decoded dense self."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.formats.table import find_format
from bitwright.models.blocks import is_linear
from bitwright.models.loading import load
from bitwright.quantization.api import quantize
from bitwright.quantization.session import quantize_module
from tests.quantization.tiny import FAMILIES, TEXT, build_model, save_model

IDS = torch.arange(24).reshape(2, 12) % 31
MIXTURES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe", "phimoe", "dbrx"]


def dense_copy(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    """The float model with every quantized weight replaced by its decoded numbers."""
    dense = copy.deepcopy(model)
    checkpoint = open_checkpoint(directory)
    layout = find_format(checkpoint.quantization or {})
    for name, record in layout.layers(checkpoint).items():
        layer = dense.get_submodule(name)
        weight = layout.decode(checkpoint, name, record).dequantize()
        layer.weight = nn.Parameter(weight if isinstance(layer, nn.Linear) else weight.t().contiguous())
    return dense


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_quantized_and_reloaded(tmp_path: Path, family: str) -> None:  # W41 for GPT-2
    model = save_model(tmp_path / "model", family)
    (tmp_path / "text").write_text(TEXT)
    report = quantize(
        tmp_path / "model", tmp_path / "out", scheme="w4g32", calibration=tmp_path / "text", samples=2, seqlen=10
    )
    inside = {name for name, module in model.named_modules() if is_linear(module) and module is not model.lm_head}
    assert report.layers.keys() == inside and set(report.unquantized) == {"lm_head"}
    assert len(report.blocks) == 2 and all(0 < error < 0.5 for error in report.blocks.values())
    loaded = load(tmp_path / "out")
    with torch.no_grad():
        expected, found = dense_copy(model, tmp_path / "out")(IDS).logits, loaded(IDS).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(found, model(IDS).logits, atol=1e-4)  # the comparison can fail


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_is_quantized_in_memory_alike(family: str, tmp_path: Path) -> None:
    model = build_model(family)
    quantize(model, tmp_path / "out", scheme="w3g32")
    quantized = quantize_module(model, scheme="w3g32")
    with torch.no_grad():
        assert torch.equal(quantized(IDS).logits, load(tmp_path / "out")(IDS).logits)


@pytest.mark.parametrize(
    "scheme", ["w8", "w4-asym", "w3g32", "w2g16-asym", "nf4g32", "nf4g32-dq", "fp8", "w8a8", "A16W4"]
)
@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_every_kind_of_scheme_is_reloaded(tmp_path: Path, family: str, scheme: str) -> None:
    model = save_model(tmp_path / "model", family, dtype=torch.bfloat16)
    report = quantize(tmp_path / "model", tmp_path / "out", scheme=scheme)
    assert {row["scheme"].split("-s")[0].lower()[:2] for row in report.layers.values()}
    loaded = load(tmp_path / "out")
    with torch.no_grad():
        expected = dense_copy(model, tmp_path / "out").float()(IDS).logits
        found = loaded(IDS).logits
    assert found.dtype == torch.bfloat16
    assert torch.corrcoef(torch.stack([expected.flatten(), found.float().flatten()]))[0, 1] > 0.99


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_of_experts_are_refused_by_the_name_of_a_matrix(tmp_path: Path, family: str) -> None:
    """From disk, where the files may hold each expert by itself, and from memory."""
    sizes = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_intermediate_size": 16}
    sizes |= {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}
    dense = FAMILIES["llama"] | {"head_dim": 8, "q_lora_rank": 8, "kv_lora_rank": 8}
    if family == "dbrx":
        dense = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 32}
        sizes = {
            "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
            "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        }
    FAMILIES[family] = dense | sizes
    try:
        model = save_model(tmp_path / "model", family)
    finally:
        del FAMILIES[family]
    for source in (model, tmp_path / "model"):
        with pytest.raises(BitwrightError) as caught:
            quantize(source, tmp_path / "out", scheme="w4g16")
        assert caught.value.code == "BW313", caught.value.render()
        assert "expert" in caught.value.what and ".0." in caught.value.what
        assert not (tmp_path / "out").exists()


def test_a_model_without_blocks_is_refused(tmp_path: Path) -> None:
    for model in (nn.Sequential(nn.Linear(8, 8)), nn.Linear(4, 4), nn.ModuleList([nn.LayerNorm(3)])):
        with pytest.raises(BitwrightError) as caught:
            quantize(model, tmp_path / "out")
        assert caught.value.code == "BW313" and type(model).__name__ in caught.value.what
        assert not (tmp_path / "out").exists()
