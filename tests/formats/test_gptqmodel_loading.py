"""End to end: models quantized and written by us, loaded and run by GPTQModel, as transformers does for both formats.

GPTQModel installs beside torch 2.13 (``pip install --no-deps gptqmodel`` and what it asks for); without it, this skips.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse
from bitwright.formats.table import get_format
from bitwright.models.blocks import is_linear
from tests.formats.layers import random_layer
from tests.models.checkpoints import ARCHITECTURES, VOCABULARY, byte_tokenizer, dequantized, save_quantized

pytestmark = pytest.mark.filterwarnings("ignore")  # the package's own

TOKENS = torch.arange(40).view(2, 20) * 7 % VOCABULARY
NAME = "model.layers.0.mlp.up_proj"


@pytest.fixture
def package(tmp_path: Path) -> Iterator[Any]:
    """The package, imported where the logs that it writes into the current directory are of no harm."""
    with contextlib.chdir(tmp_path):
        yield pytest.importorskip("gptqmodel", reason="gptqmodel is not installed")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=TOKENS).logits
    return output.float()


def float_model() -> tuple[Any, list[str]]:
    """A model in float16, and the names of the linear layers of its blocks."""
    torch.manual_seed(0)
    model = ARCHITECTURES["llama-untied"]().to(torch.float16).eval()
    return model, [name for name, module in model.named_modules() if is_linear(module) and name != "lm_head"]


def assert_same_logits(package: Any, folder: Path, model: Any, tensors: dict[str, QuantizedTensor]) -> None:
    byte_tokenizer(VOCABULARY - 257).save_pretrained(folder)
    loaded = package.GPTQModel.load(str(folder), device="cpu", dtype=torch.float16)
    kinds = {name: type(module) for name, module in loaded.model.named_modules()}
    assert {name for name, kind in kinds.items() if kind is nn.Linear and name != "lm_head"}.isdisjoint(tensors)
    expected = logits(dequantized(model, tensors))
    torch.testing.assert_close(logits(loaded.model), expected, rtol=0, atol=0.004 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("format", "name"),
    [
        ("gptq", "w4g32"), ("gptq", "w4g32-asym"), ("gptq", "w3g32"), ("gptq", "w3-asym"), ("gptq", "w2g32-asym"),
        ("gptq", "w8"), ("gptq", "w8g32-asym"), ("gptq_v2", "w4g32"), ("gptq_v1", "w4g32"), ("awq", "w4g32-asym"),
        ("awq", "w4g32"),
    ],
)  # fmt: skip
def test_it_gives_our_logits(package: Any, tmp_path: Path, format: str, name: str) -> None:
    model, names = float_model()
    tensors = save_quantized(model, tmp_path / "model", dict.fromkeys(names, parse(name)), format=format)
    assert_same_logits(package, tmp_path / "model", model, tensors)


@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_it_reads_our_rules(package: Any, tmp_path: Path, format: str) -> None:
    """Layers of several widths, layers left float, groups that are no runs of columns."""
    model, names = float_model()
    schemes = {name: parse("w8" if "v_proj" in name else "w4g32") for name in names}
    del schemes["model.layers.0.self_attn.o_proj"], schemes["model.layers.1.mlp.up_proj"]
    folder = tmp_path / "model"
    tensors = save_quantized(model, folder, schemes, format=format)
    stored = load_file(folder / "model.safetensors")
    for name in ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.k_proj"):
        columns = tensors[name].shape[1]
        index = torch.arange(columns, dtype=torch.int32) * 7 % columns // 32
        stored[f"{name}.g_idx"], tensors[name] = index, replace(tensors[name], group_index=index)
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (folder / "config.json").write_text(json.dumps(config))
    assert_same_logits(package, folder, model, tensors)


def test_it_leaves_layers_float(package: Any, tmp_path: Path) -> None:
    """In the AWQ format too, where it goes by rules and transformers by another list."""
    model, names = float_model()
    schemes = dict.fromkeys(names, parse("w4g32-asym"))
    del schemes["model.layers.0.mlp.down_proj"]
    tensors = save_quantized(model, tmp_path / "model", schemes, format="awq")
    assert_same_logits(package, tmp_path / "model", model, tensors)


@pytest.mark.parametrize(
    ("format", "left"), [("gptq", ".mlp.down_proj"), ("awq", "layers.0.mlp.down_proj"), ("gptq", "-")]
)
def test_transformers_gives_our_logits(package: Any, tmp_path: Path, format: str, left: str) -> None:
    """Which calls on GPTQModel. It knows layers left float in GPTQ if they are left in every block."""
    if format == "gptq":
        pytest.importorskip("optimum", reason="optimum is not installed")
    model, names = float_model()
    schemes = {name: parse("w4g32-asym") for name in names if left not in name}
    tensors = save_quantized(model, tmp_path / "model", schemes, format=format)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float16, device_map="cpu")
    expected = logits(dequantized(model, tensors))
    torch.testing.assert_close(logits(loaded), expected, rtol=0, atol=0.004 * float(expected.abs().max()))


@pytest.mark.parametrize("name", [f"w{bits}g32{kind}" for bits in (2, 3, 4, 8) for kind in ("", "-asym")])
@pytest.mark.parametrize("is_reordered", [False, True])
def test_it_reads_our_numbers(package: Any, name: str, is_reordered: bool) -> None:
    """A layer, decoded by the package, is what the tensor stands for, exactly in float16; so is a reordered one."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    layer, scheme = random_layer(name, (32, 64))
    if is_reordered:
        layer = replace(layer, group_index=torch.arange(64, dtype=torch.int32) * 7 % 64 // 32)
    module = TorchLinear(
        bits=scheme.weight.bits, group_size=32, sym=scheme.weight.symmetric, desc_act=is_reordered, in_features=64,
        out_features=32, bias=False, pack_dtype=torch.int32, register_buffers=True,
    )  # fmt: skip
    encoded = get_format("gptq_v2").encode(NAME, layer, scheme)
    module.load_state_dict({key.removeprefix(NAME + "."): value for key, value in encoded.items()})
    module.post_init()
    decoded = module.dequantize_weight()
    assert torch.equal(decoded.t().to(torch.float16), layer.dequantize(torch.float16))
