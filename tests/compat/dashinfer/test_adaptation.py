"""The modes of DashInfer's document: which is chosen, what it computes, and every way of asking for none of them."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bitwright.compat.dashinfer import InstantQuantConfig, adapt, load, serialize
from bitwright.core.errors import BitwrightError, Notice
from bitwright.core.scheme import DYNAMIC_INT8
from bitwright.core.scheme_names import parse
from bitwright.models import loading
from bitwright.models.blocks import is_linear
from bitwright.models.quantized import QuantizedLinear
from tests.models.checkpoints import ARCHITECTURES, VOCABULARY, dequantized, save_float, save_quantized

TOKENS = torch.arange(40).view(2, 20) * 7 % VOCABULARY
INT8 = {"quant_method": "instant_quant", "weight_format": "int8"}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=TOKENS).logits
    return output


def write_gptq(folder: Path, name: str) -> Tensor:
    """A GPTQ checkpoint, and the logits of its weights."""
    torch.manual_seed(1)
    model = ARCHITECTURES["llama-untied"]().eval()
    names = [name for name, module in model.named_modules() if is_linear(module) and name != "lm_head"]
    tensors = save_quantized(model, folder, dict.fromkeys(names, parse(name)), format="gptq")
    return logits(dequantized(model, tensors))


@pytest.fixture(scope="module")
def float_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_float(ARCHITECTURES["llama-untied"](), tmp_path_factory.mktemp("float"))


@pytest.mark.parametrize("name", ["w8g32", "w8", "w8g32-asym", "w4g32", "w4-asym"])
@pytest.mark.parametrize("weight_only", [None, False, True])
def test_a_gptq_model_runs_in_the_mode_that_the_switch_chooses(
    tmp_path: Path, name: str, weight_only: bool | None
) -> None:
    expected = write_gptq(tmp_path, name)
    chosen = adapt(tmp_path, enable_quant=True, weight_only_quant=weight_only)
    assert chosen.mode == f"A{16 if weight_only else 8}W{name[1]}" and not chosen.notices
    model = load(tmp_path, enable_quant=True, weight_only_quant=weight_only)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 14 and len(chosen.schemes) == 14
    assert {layer.scheme.activation for layer in layers} == {None if weight_only else DYNAMIC_INT8}
    error = (logits(model) - expected).abs().max() / expected.abs().max()
    assert error < 1e-4 if weight_only else 1e-4 < error < 0.05


@pytest.mark.parametrize("weight_only", [False, True])
def test_reordered_columns_run_in_both_modes(tmp_path: Path, weight_only: bool) -> None:
    """The document refuses ``desc_act``; here its groups are where ``g_idx`` says."""
    model = ARCHITECTURES["llama-untied"]().eval()
    names = [name for name, module in model.named_modules() if is_linear(module) and name != "lm_head"]
    tensors = save_quantized(model, tmp_path, dict.fromkeys(names, parse("w8g32")), format="gptq")
    path = tmp_path / "model.safetensors"
    stored = load_file(path)
    for name in names:
        columns = tensors[name].shape[1]
        index = torch.arange(columns, dtype=torch.int32) * 7 % columns // 32
        stored[f"{name}.g_idx"] = index
        tensors[name] = replace(tensors[name], group_index=index)
    save_file(stored, path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"]["desc_act"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    expected = logits(dequantized(model, tensors))
    error = (logits(load(tmp_path, weight_only_quant=weight_only)) - expected).abs().max() / expected.abs().max()
    assert error < (1e-4 if weight_only else 0.05)


@pytest.mark.parametrize(
    ("config", "mode", "scheme"),
    [
        (INT8, "A16W8", "A16W8"),
        (INT8 | {"group_size": 32}, "A16W8", "A16W8g32"),
        (INT8 | {"group_size": -1}, "A16W8", "A16W8"),
        (INT8 | {"weight_format": "uint4"}, "A16W4", "A16W4"),
        (INT8 | {"compute_method": "activate_quant"}, "A8W8", "A8W8"),
    ],
)
def test_instant_quantization(float_model: Path, config: dict[str, Any], mode: str, scheme: str) -> None:
    chosen = adapt(float_model, enable_quant=True, customized_quant_config=config)
    assert (chosen.mode, chosen.notices) == (mode, ()) and chosen.instant == InstantQuantConfig(**config)
    model = load(float_model, enable_quant=True, customized_quant_config=config)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 14 and {layer.scheme for layer in layers} == {parse(scheme)}
    expected = logits(loading.load(float_model))
    assert (logits(model) - expected).abs().max() < 0.2 * expected.abs().max()


def break_gptq(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "instant_quant"}, "no weight_format"),
        (INT8 | {"weight_format": "int3"}, "weight_format is 'int3'.*int8 or uint4"),
        (INT8 | {"weight_format": "uint4", "compute_method": "activate_quant"}, "not go with weight_format 'uint4'"),
        (INT8 | {"group_size": 128, "compute_method": "activate_quant"}, "does not go with group_size 128"),
        (INT8 | {"quant_method": "smooth"}, "quant_method is 'smooth'.*instant_quant"),
        ({"weight_format": "int8"}, "quant_method is None"),
        (INT8 | {"compute_method": "fast"}, "compute_method is 'fast'.*weight_only or activate_quant"),
        (INT8 | {"group_size": 0}, "group_size is 0"), (INT8 | {"group_sizes": 64}, "no field 'group_sizes'"),
        ("int8", "customized_quant_config is a str"),
    ],
)  # fmt: skip
def test_every_wrong_configuration_has_its_own_error(
    float_model: Path, config: Any, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """E26: before any weight is touched."""
    monkeypatch.setattr("bitwright.formats.checkpoint.read_tensor", None)
    with pytest.raises(BitwrightError, match=f"(?s)BW201.*{words}"):
        load(float_model, enable_quant=True, customized_quant_config=config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"quant_method": "awq"}, "BW311.*'awq'.*'gptq'"), ({"bits": 3}, "BW311.*3 bits.*4 and 8"),
        ({"quant_method": "bitwright"}, "BW311.*'gptq'"),
    ],
)  # fmt: skip
def test_other_quantized_models_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write_gptq(tmp_path, "w3g32")
    break_gptq(tmp_path, **changes)
    with pytest.raises(BitwrightError, match=f"(?s){words}"):
        adapt(tmp_path)


def test_what_has_no_quantization_config_says_so(float_model: Path) -> None:
    """E27."""
    with pytest.raises(BitwrightError, match=r"BW201.*no quantization_config"):
        load(float_model, enable_quant=True)
    assert adapt(float_model, enable_quant=False).mode == "A16W16"
    assert torch.equal(logits(load(float_model, enable_quant=False)), logits(loading.load(float_model)))


@pytest.mark.parametrize(
    ("method", "switch", "mode"),
    [
        ("weight_only", False, "A16W8"),
        ("activate_quant", True, "A8W8"),
        ("weight_only", True, "A16W8"),
        ("activate_quant", False, "A8W8"),
    ],
)
def test_the_configuration_counts_and_a_notice_says_so(float_model: Path, method: str, switch: bool, mode: str) -> None:
    """E27."""
    arguments: Any = {"weight_only_quant": switch, "customized_quant_config": INT8 | {"compute_method": method}}
    chosen = adapt(float_model, **arguments)
    disagree = switch != (method == "weight_only")
    assert chosen.mode == mode and len(chosen.notices) == disagree
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load(float_model, **arguments)
    assert [str(warning.message) for warning in caught if warning.category is Notice] == list(chosen.notices)


def test_groups_must_fit_the_parts_of_several_devices(tmp_path: Path, float_model: Path) -> None:
    """E26: 96 input features on 2 devices are 48 each, which groups of 32 do not divide."""
    write_gptq(tmp_path, "w8g32")
    assert adapt(tmp_path, tensor_parallel=1).mode == "A8W8"
    with pytest.raises(
        BitwrightError, match=r"(?s)BW204.*48 input features of model\.layers\.0\.mlp\.down_proj.*of 2 dev"
    ):
        adapt(tmp_path, tensor_parallel=2)
    with pytest.raises(BitwrightError, match=r"BW204.*down_proj"):
        adapt(float_model, tensor_parallel=2, customized_quant_config=INT8 | {"group_size": 32})
    assert adapt(float_model, tensor_parallel=2, customized_quant_config=INT8).mode == "A16W8"


@pytest.mark.parametrize("arguments", [{"enable_quant": 1}, {"weight_only_quant": "yes"}, {"tensor_parallel": 0}])
def test_arguments_are_checked(float_model: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(BitwrightError, match=f"BW201.*{next(iter(arguments))}"):
        adapt(float_model, **arguments)


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    write_gptq(tmp_path, "w8")
    with pytest.raises(BitwrightError, match=r"BW201.*already"):
        adapt(tmp_path, customized_quant_config=INT8)
    with pytest.raises(BitwrightError, match=r"BW201.*enable_quant"):
        adapt(tmp_path, enable_quant=False)
    with pytest.raises(BitwrightError, match=r"BW201.*A8W8"):
        serialize(tmp_path, tmp_path / "out")


def test_what_is_written_keeps_all_but_the_layers_of_blocks_float(tmp_path: Path, float_model: Path) -> None:
    """E31: and the sizes of all tensors add up to the files."""
    output = tmp_path / "out"
    serialize(float_model, output, enable_quant=True, customized_quant_config=INT8)
    tensors = {name: tensor for path in output.glob("*.safetensors") for name, tensor in load_file(path).items()}
    quantized = {name.removesuffix(".codes") for name in tensors if name.endswith(".codes")}
    per_block = {name.split(".", 3)[3] for name in quantized}
    assert len(quantized) == 14 and len(per_block) == 7
    kept = {name for name in tensors if not any(name.startswith(f"{layer}.") for layer in quantized)}
    assert {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"} <= kept
    assert all(tensors[name].is_floating_point() for name in kept)
    index = json.loads((output / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.numel() * t.element_size() for t in tensors.values())
    in_memory = load(float_model, customized_quant_config=INT8)
    assert torch.equal(logits(loading.load(output)), logits(in_memory))
