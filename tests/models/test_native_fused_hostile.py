"""Damaged and contradictory checkpoints of quantized fused layers: each is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.models.direct_loading import open_direct
from bitwright.models.kv_scales import attention_names
from bitwright.models.loading import load
from tests.models.fused_models import QWEN, quantized, saved

C_ATTN, WQKV = "transformer.h.1.attn.c_attn", "model.layers.1.attention.wqkv"
Change = Callable[[Tensor], Tensor]


def damage(directory: Path, name: str, change: Change | None) -> None:
    """Change a tensor of a checkpoint, or take it away."""
    tensors = load_file(directory / "model.safetensors")
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).contiguous()
    save_file(tensors, directory / "model.safetensors")


def reconfigure(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= changes
    (directory / "config.json").write_text(json.dumps(config))


DAMAGED: list[tuple[str, str, str, Change | None, str]] = [
    ("qwen", "gptq", f"{C_ATTN}.qzeros", None, "BW303"), ("qwen", "gptq", f"{C_ATTN}.scales", None, "BW303"),
    ("qwen", "gptq", f"{C_ATTN}.g_idx", lambda t: t[:-1], "BW304"),
    ("qwen", "gptq", f"{C_ATTN}.g_idx", lambda t: t + 1, "BW311"),
    ("qwen", "gptq", f"{C_ATTN}.qweight", lambda t: t[:, :160], "BW304"),
    ("qwen", "gptq", f"{C_ATTN}.qzeros", lambda t: t[:, :-1], "BW304"),
    ("qwen", "gptq", f"{C_ATTN}.bias", lambda t: t[:-1], "BW304"),
    ("qwen", "gptq", f"{C_ATTN}.bias", lambda t: t.int(), "BW304"),
    ("qwen", "gptq", f"{C_ATTN}.scales", lambda t: t * float("nan"), "BW309"),
    ("internlm2", "awq", f"{WQKV}.qzeros", None, "BW303"),
    ("internlm2", "awq", f"{WQKV}.qweight", lambda t: t[:, :-1], "BW304"),
    ("internlm2", "awq", f"{WQKV}.qweight", lambda t: t[:-1], "BW304"),
    ("internlm2", "compressed-tensors", f"{WQKV}.weight_scale", None, "BW303"),
    ("internlm2", "compressed-tensors", f"{WQKV}.weight_packed", lambda t: t[:-1], "BW304"),
]  # fmt: skip


@pytest.mark.parametrize(("model", "layout", "name", "change", "code"), DAMAGED)
def test_one_wrong_tensor_is_enough(
    tmp_path: Path, model: str, layout: str, name: str, change: Change | None, code: str
) -> None:
    directory = quantized(tmp_path / "q", model, layout, "w4g32-asym").directory
    load(directory)
    damage(directory, name, change)
    with pytest.raises(BitwrightError) as refused:
        load(directory)
    assert refused.value.code == code
    layer, _, leaf = name.rpartition(".")
    named = layer if leaf != "bias" or code != "BW304" else "bias"
    assert named in str(refused.value), refused.value


@pytest.mark.parametrize("scheme", ["w4g32", "w8g32"])
def test_all_tensors_of_another_number_of_rows(tmp_path: Path, scheme: str) -> None:
    """Consistent with each other, but not with config.json."""
    directory = quantized(tmp_path / "q", "qwen", "gptq", scheme).directory
    bits = int(scheme[1])
    tensors = load_file(directory / "model.safetensors")
    for leaf, kept in (("qweight", 160), ("scales", 160), ("qzeros", 160 * bits // 32)):
        tensors[f"{C_ATTN}.{leaf}"] = tensors[f"{C_ATTN}.{leaf}"][:, :kept].contiguous()
    save_file(tensors, directory / "model.safetensors")
    with pytest.raises(BitwrightError, match=rf"BW304.*{C_ATTN} is of 160 rows; config.json calls for 192"):
        load(directory)
    assert open_direct(directory) is None


def test_a_bias_that_the_model_has_no_place_for(tmp_path: Path) -> None:
    """Old writers give all layers biases of zeros, which do nothing; others cannot be left out."""
    directory = quantized(tmp_path / "q", "qwen", "gptq", "w4g32").directory
    tokens = torch.arange(1, 30).unsqueeze(0)
    with torch.no_grad():
        before = load(directory)(input_ids=tokens).logits
        name, tensors = "transformer.h.0.mlp.c_proj.bias", load_file(directory / "model.safetensors")
        save_file(tensors | {name: torch.zeros(64).half()}, directory / "model.safetensors")
        assert torch.equal(load(directory)(input_ids=tokens).logits, before)
    save_file(tensors | {name: torch.ones(64).half()}, directory / "model.safetensors")
    with pytest.raises(BitwrightError, match=r"BW303.*model\.layers\.0\.mlp\.down_proj\.bias"):
        load(directory)


RULES: list[tuple[str, str, dict[str, Any], str]] = [
    ("qwen", "gptq", {"dynamic": {r"-:.*\.c_attn$": {}}}, "c_attn is stored quantized, but a rule"),
    ("qwen", "gptq", {"modules_in_block_to_quantize": [["attn.c_proj", "mlp.w1"]]}, "c_attn is stored quantized"),
    ("internlm2", "awq", {"modules_to_not_convert": ["wqkv"]}, "wqkv is stored quantized"),
    ("internlm2", "awq", {"modules_to_not_convert": ["feed_forward.w1"]}, "w1 is stored quantized"),
]


@pytest.mark.parametrize(("model", "layout", "changes", "says"), RULES)
def test_rules_go_by_the_names_in_the_files(
    tmp_path: Path, model: str, layout: str, changes: dict[str, Any], says: str
) -> None:
    directory = quantized(tmp_path / "q", model, layout, "w4g32-asym").directory
    reconfigure(directory, **changes)
    with pytest.raises(BitwrightError, match=f"BW311.*{says}"):
        load(directory)
    if layout == "gptq":
        inner = ["attn.c_attn", "attn.c_proj", "mlp.w1", "mlp.w2", "mlp.c_proj"]
        reconfigure(directory, dynamic={r"-:.*\.q_proj$": {}}, modules_in_block_to_quantize=[inner])
    else:
        reconfigure(directory, modules_to_not_convert=["q_proj", "lm_head", "output"])
    load(directory)


def test_a_layer_that_a_rule_leaves_float(tmp_path: Path) -> None:
    """The fused layer of one block is float, and read by rows; its neighbours are quantized."""
    made = quantized(tmp_path / "q", "qwen", "gptq", "w4g32")
    tensors = load_file(made.directory / "model.safetensors")
    for leaf in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{C_ATTN}.{leaf}"]
    weight = made.drawn[f"{C_ATTN}.weight"]
    save_file(tensors | {f"{C_ATTN}.weight": weight}, made.directory / "model.safetensors")
    reconfigure(made.directory, dynamic={r"-:^transformer\.h\.1\.attn\.c_attn$": {}})
    loaded: Any = load(made.directory)
    layers = [loaded.get_submodule(f"model.layers.1.self_attn.{part}_proj") for part in "qkv"]
    assert torch.equal(torch.cat([layer.weight for layer in layers]), weight)
    direct = open_direct(made.directory)
    assert direct is None or direct.pack(None).blocks[1].key.bias is not None


def test_a_tensor_too_many_of_a_float_layer(tmp_path: Path) -> None:
    """It is the one that has no place, and what belongs to the layer has its own."""
    directory, tensors = saved(tmp_path / "f", QWEN)
    save_file(tensors | {f"{C_ATTN}.extra": torch.ones(2)}, directory / "model.safetensors")
    with pytest.raises(BitwrightError, match=rf"BW303.*1 tensors are in the files without a place.*{C_ATTN}\.extra"):
        load(directory)


def test_rows_that_share_scales_are_refused(tmp_path: Path) -> None:
    directory = quantized(tmp_path / "q", "qwen", "native", "w4g32-axis0").directory
    with pytest.raises(BitwrightError, match=r"BW306.*transformer\.h\.0\.attn\.c_attn.*share scales"):
        load(directory)


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    directory = quantized(tmp_path / "q", "internlm2", "awq", "w4g32").directory
    tensors = load_file(directory / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["output.weight"].clone()}, directory / "model.safetensors")
    with pytest.raises(BitwrightError, match=r"BW303.*both (output|lm_head)\.weight and (output|lm_head)\.weight"):
        load(directory)


def test_scales_of_the_cache_are_not_written_into_files_of_other_names(tmp_path: Path) -> None:
    directory = quantized(tmp_path / "q", "qwen", "compressed-tensors", "w4g32").directory
    with pytest.raises(ArgumentError, match=r"BW201.*names of a model's own files"):
        attention_names(open_checkpoint(directory), "fp8")
