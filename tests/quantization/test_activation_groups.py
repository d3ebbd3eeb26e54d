"""Groups of activations, planned, stored and loaded; what contradicts them is refused before any work."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.scheme_names import parse
from bitwright.formats import compressed_tensors, native
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.formats.records import LayerRecord
from bitwright.formats.safetensors_file import serialize
from bitwright.formats.storage import write_file
from bitwright.models.loading import load
from bitwright.quantization.api import quantize
from bitwright.quantization.session import quantize_module
from tests.formats.layers import make_layer, write_checkpoint
from tests.quantization.tiny import build_model

NAME = "model.layers.0.mlp.up_proj"
TOKENS = torch.arange(9)[None] % 32


@pytest.mark.parametrize("scheme", ["w4g32-a8g32", "w8-a8g16", "w4g32-asym-a8g16"])
@pytest.mark.parametrize("format", ["compressed-tensors", "native"])
def test_a_checkpoint_runs_as_the_model_in_memory(tmp_path: Path, scheme: str, format: str) -> None:
    model = build_model("llama")
    report = quantize(model, tmp_path / "out", scheme=scheme, format=format)
    assert report.format == format and {layer["scheme"] for layer in report.layers.values()} == {scheme}
    expected = quantize_module(build_model("llama"), scheme=scheme)(TOKENS).logits
    assert torch.equal(load(tmp_path / "out")(TOKENS).logits, expected)
    per_token = quantize_module(build_model("llama"), scheme=scheme.rpartition("g")[0])(TOKENS).logits
    assert not torch.equal(per_token, expected)


def test_an_order_that_takes_groups_apart_is_refused_before_any_work(tmp_path: Path) -> None:
    options = {"act_order": True, "static_groups": False}
    with pytest.raises(ArgumentError, match="reordered columns") as caught:
        quantize(build_model("llama"), tmp_path / "out", scheme="w4g32-a8g32", algorithm="gptq", options=options)
    assert caught.value.code == "BW202" and "static_groups=true" in caught.value.suggestion
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", ["gptq", "awq"])
def test_formats_without_activations_refuse_by_name(tmp_path: Path, format: str) -> None:
    with pytest.raises(BitwrightError, match=r"BW205.*8-bit activations"):
        quantize(build_model("llama"), tmp_path / "out", scheme="w4g32-a8g32", format=format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("fallback", "told"), [("pad", "w8-a8g32"), ("per-channel", "w8-a8"), ("skip", None)])
def test_groups_that_do_not_divide_a_layer(tmp_path: Path, fallback: str, told: str | None) -> None:
    fields = {"hidden_size": 48, "num_attention_heads": 4, "head_dim": 12}  # 48 is no multiple of 32
    with pytest.raises(BitwrightError, match="BW204"):
        quantize(build_model("llama", **fields), tmp_path / "out", scheme="w8-a8g32")
    report = quantize(build_model("llama", **fields), tmp_path / "out", scheme="w8-a8g32", group_fallback=fallback)
    q = report.layers.get("model.layers.0.self_attn.q_proj")
    assert (None if q is None else q["scheme"]) == told
    assert load(tmp_path / "out")(TOKENS).logits.isfinite().all()


@pytest.mark.parametrize("change", [{"group_size": 48}, {"group_size": None}, {"group_size": "32"}, {"dynamic": False}])
def test_what_compressed_tensors_cannot_mean_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    write_checkpoint(tmp_path, compressed_tensors.FORMAT, {NAME: make_layer("w4g32-a8g32", (8, 64))})
    config = json.loads((tmp_path / "config.json").read_bytes())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"] |= change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitwrightError, match="BW304" if change == {"group_size": 48} else r"BW311.*per group"):
        compressed_tensors.FORMAT.layers(open_checkpoint(tmp_path))


def test_reordered_columns_of_a_checkpoint_are_refused(tmp_path: Path) -> None:
    index = torch.arange(64, dtype=torch.int32) % 2
    tensor, scheme = make_layer("w4g32-a8g32", (8, 64))
    for number, (layout, field) in enumerate(((compressed_tensors, "weight_g_idx"), (native, "group_index"))):
        folder = tmp_path / str(number)
        write_checkpoint(folder, layout.FORMAT, {NAME: (tensor, scheme)})
        assert layout.FORMAT.layers(open_checkpoint(folder)) == {NAME: LayerRecord(parse("w4g32-a8g32"), (8, 64))}
        tensors = layout.FORMAT.encode(NAME, tensor, scheme) | {f"{NAME}.{field}": index}
        write_file(folder / "model.safetensors", serialize(tensors))
        with pytest.raises(BitwrightError, match="BW311"):
            layout.FORMAT.layers(open_checkpoint(folder))
