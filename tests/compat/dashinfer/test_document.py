"""Every code block of DashInfer's document runs, with the import path and the model's name replaced.

Two slips of the document are mended: A16W4's block leaves out ``my_quant_config``, which the common suffix uses; and
the suffix itself assigns ``my_quant_config`` again, so that the block before it would never count.
"""

from __future__ import annotations

import re
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest

from bitwright.compat.dashinfer import InstantQuantConfig
from bitwright.core.errors import Notice
from bitwright.core.scheme_names import parse
from tests.models.checkpoints import ARCHITECTURES, save_float, save_quantized

DOCUMENT = Path(__file__).resolve().parents[4] / "shared" / "seeds" / "dashinfer_weight_quantization.rst"
SCHEMES = {
    "simpled_a16w8_per_channel_customized_quant_config": "A16W8",
    "simple_a16w8_group128_customized_quant_config": "A16W8g128",
    "simpled_a16w4_customized_quant_config": "A16W4",
    "simpled_a8w8_customized_quant_config": "A8W8",
}


@pytest.fixture(scope="module")
def blocks() -> list[str]:
    if not DOCUMENT.is_file():
        pytest.skip("no document: it is looked for in a folder 'shared/seeds' beside the repository")
    lines = DOCUMENT.read_text(encoding="utf-8").splitlines()
    found: list[list[str]] = []
    for number, line in enumerate(lines):
        if line.strip() == ".. code-block:: python":
            block = []
            for following in lines[number + 1 :]:
                if following.strip() and not following.startswith("    "):
                    break
                block.append(following)
            found.append(block)
    return [textwrap.dedent("\n".join(block)).strip() + "\n" for block in found]


def replaced(block: str, model: str) -> str:
    """With our import paths, and ``model`` for every model that the document names."""
    block = block.replace("import modelscope\n", "from bitwright.compat.dashinfer import modelscope\n")
    block = block.replace("modelscope.utils.constant", "bitwright.compat.dashinfer.modelscope")
    block = re.sub(r"from dashinfer\b", "from bitwright.compat.dashinfer", block)
    return re.sub(r'(modelscope_name ?= ?)"qwen/[^"]*"', lambda match: f"{match[1]}{model!r}", block)


def execute(text: str, names: dict[str, Any]) -> None:
    """The document's devices and lengths are a data centre's; the engine says what it uses instead."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "there is no CUDA device|max_length is 2048", Notice)
        exec(compile(text, str(DOCUMENT.name), "exec"), names)


def test_the_blocks_are_those_that_are_known(blocks: list[str]) -> None:
    first = [block.splitlines()[0] for block in blocks]
    assert first == [
        "...", "...", "import os", "# paste your quant config here.", "# simplied quant config with per-channel int8",
        "# sub-channel with group 128 instant quant with int8", "# per-channel int4 instant quant config.",
        "simpled_a8w8_customized_quant_config = {",
    ]  # fmt: skip
    slips = [block for block in blocks[4:] if "my_quant_config =" not in block.replace("customized_quant_config =", "")]
    assert len(slips) == 1 and "uint4" in slips[0]


@pytest.mark.parametrize("number", [3, 4, 5, 6, 7])
def test_instant_quantization_as_the_document_has_it(
    blocks: list[str], number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The prefix, one of the configurations, the suffix: number 3 is the suffix with its own configuration."""
    monkeypatch.chdir(tmp_path)
    prefix, suffix = replaced(blocks[2], "demo:"), replaced(blocks[3], "demo:")
    suffix = suffix.replace("max_length(2048)", "max_length(128)").replace(
        '{"top_k": 1}', '{"top_k": 1, "max_length": 96}'
    )
    names: dict[str, Any] = {}
    execute(prefix, names)
    if number != 3:
        block = blocks[number]
        execute(block, names)
        chosen = next(name for name in SCHEMES if name in block)
        names["my_quant_config"] = names[chosen]
        suffix = re.sub(r"my_quant_config = simpled\w+\n", "", suffix)
    execute(suffix, names)
    printed = capsys.readouterr().out
    assert names["status"] is names["allspark"].GenerateRequestStatus.GenerateFinished
    assert names["output_text"] in printed and len(names["generated_ids"]) > 4
    mode = parse(SCHEMES[chosen]).name if number != 3 else parse("A16W8").name
    assert InstantQuantConfig.from_dict(names["my_quant_config"]).scheme.name == mode
    assert names["engine"].release_model.__self__._models == {}


@pytest.mark.parametrize(("number", "mode"), [(0, "A8W8"), (1, "A16W8")])
def test_gptq_models_as_the_document_has_them(blocks: list[str], number: int, mode: str, tmp_path: Path) -> None:
    model = ARCHITECTURES["llama-untied"]().eval()
    save_float(model, tmp_path / "gptq")
    layers = [name for name, module in model.named_modules() if name.endswith("_proj")]
    save_quantized(model, tmp_path / "gptq", dict.fromkeys(layers, parse("w8g32")), format="gptq")
    names: dict[str, Any] = {}
    execute(
        replaced(blocks[2], str(tmp_path / "gptq")).replace("safe_model_name = str", 'safe_model_name = "m" or str'),
        names,
    )
    execute(replaced(blocks[number], str(tmp_path / "gptq")), names)
    assert names["model_loader"].mode == mode


def test_its_dictionaries_mean_our_schemes(blocks: list[str]) -> None:
    names: dict[str, Any] = {}
    for block in blocks[4:]:
        exec(compile(block, DOCUMENT.name, "exec"), names)
    found = {name: InstantQuantConfig.from_dict(names[name]).scheme for name in SCHEMES}
    assert found == {name: parse(scheme) for name, scheme in SCHEMES.items()}
