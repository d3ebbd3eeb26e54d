"""Quantized InternLM2 and first Qwen: integers of fused layers, taken apart by rows as they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitwright import Engine
from bitwright.cli.inspection import inspect
from bitwright.core import bitpack
from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.formats.parts import PartReader, find_parts
from bitwright.formats.table import find_format
from bitwright.kernels import native_library
from bitwright.models.decoder_native import NativeDecoder
from bitwright.models.direct_loading import open_direct
from bitwright.models.loading import load
from bitwright.models.quantized import QuantizedLinear
from tests.formats.layers import same_tensor
from tests.models import decoder_laws
from tests.models.fused_models import (
    MODELS,
    VOCABULARY,
    internlm2_logits,
    quantized,
    qwen_logits,
    rounded_layer,
    saved,
)

CASES = [
    ("qwen", "gptq", "w4g32", False), ("qwen", "gptq", "w8g32", True), ("qwen", "gptq_v2", "w3g32-asym", True),
    ("qwen", "gptq_v1", "w2g32-asym", False), ("qwen", "awq", "w4g32-asym", False), ("qwen", "native", "nf4g32", False),
    ("qwen", "compressed-tensors", "w4g32-asym", False), ("qwen", "compressed-tensors", "w8a8", False),
    ("internlm2", "awq", "w4g32-asym", False), ("internlm2", "awq", "w4g32", False),
    ("internlm2-bias", "gptq", "w4", False), ("internlm2", "gptq", "w3g32-asym", True),
    ("internlm2", "compressed-tensors", "w3g32", False), ("internlm2-bias", "compressed-tensors", "w8a8", False),
]  # fmt: skip


@pytest.mark.parametrize(("model", "layout", "scheme", "reorder"), CASES)
def test_integers_stay_and_logits_are_the_fused_matrix_s(
    tmp_path: Path, model: str, layout: str, scheme: str, reorder: bool
) -> None:
    made = quantized(tmp_path / "q", model, layout, scheme, reorder=reorder)
    wanted = parse(scheme)
    floats = open_checkpoint(saved(tmp_path / "f", dict(MODELS[model]))[0])  # reads its fused weights by rows
    loaded: Any = load(made.directory)
    for number in range(2):
        for part in ("q_proj", "k_proj", "v_proj"):
            name = f"model.layers.{number}.self_attn.{part}"
            layer = loaded.get_submodule(name)
            assert isinstance(layer, QuantizedLinear)
            assert same_tensor(layer.unpack(), rounded_layer(floats.read(f"{name}.weight"), wanted, reorder)), name
    restated = qwen_logits if model == "qwen" else internlm2_logits
    tokens = torch.randint(0, VOCABULARY, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    expected = restated(made.rounded, tokens, model == "internlm2-bias")
    bound = 0.08 if wanted.activation is not None else 2e-4  # inputs of 8 bits
    with torch.no_grad():
        found = loaded(input_ids=torch.tensor([tokens])).logits[0].double()
    assert (found - expected).norm() < bound * expected.norm()
    if native_library.missing() is None:
        direct = open_direct(made.directory)
        assert direct is not None
        decoder = NativeDecoder(direct.pack(None))
        piece = decoder_laws.Piece(decoder_laws.Text(tokens, [2, 0]), 50)
        logits = decoder_laws.run(decoder, decoder.new_cache(3), [piece])[0].double()
        assert (logits - expected).norm() < bound * expected.norm()


def test_a_head_is_read_under_its_own_name(tmp_path: Path) -> None:
    made = quantized(tmp_path / "q", "internlm2", "native", "w4g32", head=True)
    assert "output" in made.config["quantization_config"]["layers"]
    head = load(made.directory).get_submodule("lm_head")
    assert isinstance(head, QuantizedLinear)
    assert torch.equal(head.dequantize(), made.rounded["output.weight"])


@pytest.mark.parametrize("model", ["qwen", "internlm2"])
def test_the_engine_answers_from_the_files(tmp_path: Path, model: str) -> None:
    made = quantized(tmp_path / "q", model, "gptq", "w4g32", reorder=True)
    tokens = list(range(1, 40))
    restated = qwen_logits if model == "qwen" else internlm2_logits
    expected = int(restated(made.rounded, tokens, False)[-1].argmax())
    for decoder in ("auto", "torch"):
        with Engine(made.directory, decoder=decoder) as engine:  # which has no tokenizer, and takes tokens
            answer = engine.generate([tokens], max_tokens=8, ignore_end=True)[0].tokens
            assert answer[0] == expected and len(answer) == 8
            with pytest.raises(BitwrightError, match="BW312"):
                engine.generate("a text")


def test_a_fused_layer_is_unpacked_once(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(quantized(tmp_path / "q", "internlm2", "awq", "w4g32-asym").directory)
    layout = find_format(checkpoint.quantization or {})
    asked: list[str] = []

    def decode(*arguments: Any) -> QuantizedTensor:
        asked.append(arguments[1])
        return layout.decode(*arguments)

    layers = find_parts(checkpoint, layout.layers(checkpoint))
    reader = PartReader(checkpoint, replace(layout, decode=decode))
    for layer in layers.values():
        reader.read(layer)
    assert asked.count("model.layers.0.attention.wqkv") == 1 and len(asked) == 2 * 5
    assert reader._held is None
    first, second = (layers[f"model.layers.{number}.self_attn.q_proj"] for number in range(2))
    assert not torch.equal(reader.read(first).codes, reader.read(second).codes)  # before all parts were asked for
    asked.clear()
    assert torch.equal(reader.read(first).codes, reader.read(first).codes) and asked == [first.name]


def test_it_is_saved_under_the_names_of_the_model_that_it_is(tmp_path: Path) -> None:
    """Which is what other engines read: the same integers, queries, keys and values apart."""
    made = quantized(tmp_path / "q", "internlm2", "awq", "w4g32-asym")
    loaded: Any = load(made.directory)
    loaded.save_pretrained(tmp_path / "s")
    written = json.loads((tmp_path / "s" / "config.json").read_text())
    assert written["model_type"] == "llama" and written["quantization_config"]["quant_method"] == "awq"
    again: Any = load(tmp_path / "s")
    tokens = torch.arange(1, 40).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, loaded(input_ids=tokens).logits)


def test_they_are_inspected_as_they_are_stored(tmp_path: Path) -> None:
    made = quantized(tmp_path / "q", "qwen", "gptq", "w4g32")
    found = inspect(made.directory)
    assert found.format == "gptq" and found.architecture == "Qwen2ForCausalLM" and len(found.layers) == 2 * 5
    facts = {layer.name: layer for layer in found.layers}
    fused = facts["transformer.h.1.attn.c_attn"]
    assert fused.shape == (192, 64) and fused.scheme == "w4g32"
    assert fused.bytes == (192 * 64 // 2) + 2 * (192 // 2) + 2 * 192 * 2 + 64 * 4  # codes, zeros, scales, g_idx


def test_old_files_say_it_beside_their_configuration(tmp_path: Path) -> None:
    """As AutoGPTQ left the first checkpoints of Qwen."""
    made = quantized(tmp_path / "q", "qwen", "gptq", "w8g32")
    before = load(made.directory).state_dict()
    config = json.loads((made.directory / "config.json").read_text())
    record = config.pop("quantization_config")
    old = {name: record[name] for name in ("bits", "group_size", "desc_act", "sym")} | {"damp_percent": 0.01}
    (made.directory / "config.json").write_text(json.dumps(config))
    (made.directory / "quantize_config.json").write_text(json.dumps(old))
    (made.directory / "model.safetensors").rename(made.directory / "gptq_model-8bit-32g.safetensors")
    after = load(made.directory).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()) and before.keys() == after.keys()


@pytest.mark.parametrize("model", ["qwen", "internlm2"])
@pytest.mark.parametrize("layout", ["gemv", "auto-round"])
def test_the_other_layouts_of_awq(tmp_path: Path, model: str, layout: str) -> None:
    """Rows of codes and of padded groups (gemv), and AutoRound's name for gemm."""
    made = quantized(tmp_path / "q", model, "awq", "w4g32-asym")
    before = load(made.directory).state_dict()
    checkpoint = open_checkpoint(made.directory)
    record = dict(checkpoint.quantization or {})
    if layout == "auto-round":
        common = {"quant_method": "auto-round", "packing_format": "auto_round:auto_awq", "sym": False}
        record = common | {name: record[name] for name in ("bits", "group_size")}
    else:
        record["version"] = "gemv"
        found, tensors = find_format(record), load_file(made.directory / "model.safetensors")
        for name, layer in find_format(checkpoint.quantization or {}).layers(checkpoint).items():
            tensor = found.decode(checkpoint, name, layer)
            assert isinstance(tensor.scale, Tensor) and tensor.zero is not None
            padding = (0, 32 - tensor.scale.shape[1])  # groups of 32: room for 32 of them
            tensors[f"{name}.qweight"] = bitpack.pack(tensor.codes, 4)
            tensors[f"{name}.qzeros"] = bitpack.pack(torch.nn.functional.pad(tensor.zero, padding), 4)
            tensors[f"{name}.scales"] = torch.nn.functional.pad(tensor.scale, padding)
        save_file(tensors, made.directory / "model.safetensors")
    config = json.loads((made.directory / "config.json").read_text()) | {"quantization_config": record}
    (made.directory / "config.json").write_text(json.dumps(config))
    after = load(made.directory).state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items()) and before.keys() == after.keys()
