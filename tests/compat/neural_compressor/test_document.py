"""Every code block of the Neural Compressor document runs, as it stands there but for import paths and placeholders."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.compat.neural_compressor.torch import quantization as names
from tests.quantization.tiny import build_model, save_model

BLOCK = re.compile(r"^``` ?python\n(.*?)^```", re.MULTILINE | re.DOTALL)
IDS = torch.arange(64).view(2, 32) % 32


@pytest.fixture
def blocks(document: str) -> list[str]:
    """The code blocks of the document, in order."""
    return BLOCK.findall(document)


def train(model: nn.Module) -> None:
    """A user's training of TEQ's scales, as short as can be."""
    goal = build_model("llama")(IDS).logits.detach()
    optimizer = torch.optim.Adam([parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        torch.autograd.backward([(model(IDS).logits - goal).square().mean()])
        optimizer.step()


def run(code: str, **given: Any) -> dict[str, Any]:
    """Execute a block, with only the import paths replaced."""
    scope = {"run_fn": lambda model: model(IDS), "train_fn": train, "example_inputs": IDS, **given}
    exec(code.replace("neural_compressor.torch", "bitwright.compat.neural_compressor.torch"), scope)
    return scope


def count(model: nn.Module) -> int:
    return sum(isinstance(module, names.WeightOnlyLinear) for module in model.modules())


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        made: Tensor = model(IDS).logits
    return made


def test_no_block_of_the_document_is_left_out(blocks: list[str]) -> None:
    assert len(blocks) == 12
    assert sum("Config()\nmodel = prepare" in block for block in blocks) == 7


@pytest.mark.parametrize("number", [0, 1, 3, 4, 5, 6], ids=["rtn", "gptq", "autoround", "awq", "teq", "hqq"])
def test_each_algorithm(blocks: list[str], number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    code = blocks[number]
    if "AutoRoundConfig" in code:  # as few steps as show that it ran; 200 take too long
        code = code.replace("AutoRoundConfig()", "AutoRoundConfig(iters=4)")
    model = build_model("llama")
    before = logits(model)
    made = run(code, model=model)["model"]
    assert made is model and count(made) == 14
    error = float((logits(made) - before).norm() / before.norm())
    assert 0 < error < 0.35


def test_rules_from_a_dictionary(blocks: list[str]) -> None:
    quant_config = run(blocks[7])["quant_config"]
    made = names.quantize(build_model("llama"), quant_config)
    assert count(made) == 14
    assert type(made.get_submodule("lm_head")) is nn.Linear
    assert made.get_submodule("model.layers.0.mlp.up_proj").scheme.name == "w4"


def test_rules_by_set_local(blocks: list[str]) -> None:
    quant_config = run(blocks[8], RTNConfig=names.RTNConfig)["quant_config"]
    assert count(names.quantize(build_model("llama"), quant_config)) == 14


def test_rules_of_autoround(blocks: list[str]) -> None:
    quant_config = run(blocks[9], AutoRoundConfig=names.AutoRoundConfig)["quant_config"]
    quant_config.iters = 2
    made = names.quantize(build_model("llama"), quant_config, lambda model: model(IDS))
    assert count(made) == 15


def test_the_rules_that_a_comment_shows(blocks: list[str]) -> None:
    comment = [line.removeprefix("# ") for line in blocks[9].splitlines() if line.startswith(("# ", "#  "))]
    scope: dict[str, Any] = {}
    exec("\n".join(comment[: comment.index("}") + 1]), scope)
    rules = {rule.pattern: rule.config for rule in names.AutoRoundConfig(layer_config=scope["layer_config"]).local}
    assert (rules["layer1"].bits, rules["layer1"].group_size, rules["layer1"].use_sym) == (3, 128, True)
    assert (rules["layer2"].bits, rules["layer2"].dtype) == (8, "int")


def test_saving_and_loading(blocks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = build_model("llama")
    scope = run(blocks[10], model=model, YOURMODEL=lambda: build_model("llama", seed=5))
    assert {path.name for path in Path("saved_results").iterdir()} == {"quantized_model.pt", "qconfig.json"}
    assert torch.equal(logits(scope["loaded_model"]), logits(scope["model"]))


def test_layer_wise_quantization(blocks: list[str], tmp_path: Path) -> None:
    model = save_model(tmp_path / "model", "llama", shard="20KB")
    code = blocks[11].replace("/path/to/model/state/dict", str(tmp_path / "model"))
    made = run(code)["quantized_model"]
    assert not any(tensor.is_meta for tensor in made.state_dict().values())
    assert torch.equal(logits(made), logits(names.quantize(model, names.RTNConfig())))


def test_four_bit_weights_with_fp8_inputs(blocks: list[str], tmp_path: Path) -> None:
    saved, stats = tmp_path / "saved", str(tmp_path / "measure")
    first = names.GPTQConfig(fp8_aware=True)
    names.quantize(build_model("llama"), first, lambda model: model(IDS)).save(saved)  # type: ignore[operator]
    paths = {}
    for mode, file in (("MEASURE", "measure"), ("QUANTIZE", "quant")):
        paths[f"path_to_{file}_json"] = tmp_path / f"{file}.json"
        names.HybridGPTQConfig(mode=mode, dump_stats_path=stats).to_json_file(paths[f"path_to_{file}_json"])
    given = {"load": names.load, "finalize_calibration": names.finalize_calibration, "path_to_quantized_model": saved}
    made = run(blocks[2], model=build_model("llama"), **given, **paths)["model"]
    rounded = [layer for layer in made.modules() if getattr(layer, "activation_scale", None) is not None]
    assert len(rounded) == 14
    before = logits(names.load(saved))
    assert 0 < float((logits(made) - before).norm() / before.norm()) < 0.1
