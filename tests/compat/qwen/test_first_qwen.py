"""The models that Qwen's document names: the first Qwen, its GPTQ checkpoints, its own vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bitwright
from bitwright.cli.app import run
from bitwright.compat.dashinfer.adaptation import adapt
from bitwright.compat.qwen import AutoModelForCausalLM, AutoTokenizer
from bitwright.core.errors import Notice
from bitwright.evaluation.comparison import evaluate
from bitwright.models.quantized import QuantizedLinear
from tests.models.fused_models import QWEN, saved
from tests.models.vocabularies import learned_ranks, write_qwen


@pytest.mark.parametrize(("name", "bits"), [("Int4", 4), ("Int8", 8)])
def test_it_loads_and_talks(first_qwen: dict[str, Path], name: str, bits: int) -> None:
    directory = first_qwen[name]
    tokenizer = AutoTokenizer.from_pretrained(directory)
    with pytest.warns(Notice, match="never runs code"):
        model: Any = AutoModelForCausalLM.from_pretrained(directory, device_map="auto", trust_remote_code=True)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 2 * 7 and {layer.scheme.weight.bits for layer in layers} == {bits}
    assert model.dtype == torch.float16  # as its flag says
    response, history = model.chat(tokenizer, "Hi", history=None, max_new_tokens=6)
    assert history == [("Hi", response)]
    again, longer = model.chat(tokenizer, "And then?", history=history, max_new_tokens=6)
    assert longer == [*history, ("And then?", again)]


def test_an_engine_talks_as_the_model_does(first_qwen: dict[str, Path]) -> None:
    """From its files, without loading the model; the template is what the models were taught."""
    with bitwright.Engine(first_qwen["Int8"]) as engine:
        assert engine.tokenizer is not None
        asked = [{"role": "user", "content": "Hi"}]
        answer = engine.generate([asked], max_tokens=6, ignore_end=True)[0]
        same = engine.generate("Hi", chat=True, max_tokens=6, ignore_end=True)
    assert len(answer.tokens) == 6 and answer.tokens == same.tokens


def test_its_numbers_are_chosen_as_dashinfer_does(first_qwen: dict[str, Path]) -> None:
    """Parts of a fused layer are layers of the model that it is."""
    chosen = adapt(first_qwen["Int4"])
    assert chosen.mode == "A8W4" and "model.layers.1.self_attn.v_proj" in chosen.schemes
    assert adapt(first_qwen["Int4"], weight_only_quant=True).mode == "A16W4"


def test_it_is_evaluated_and_generates_with_its_own_vocabulary(first_qwen: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("The cat sat on the mat. " * 60)
    result = evaluate([first_qwen["Int8"]], text=str(tmp_path / "text.txt"), seqlen=64, probes=False)
    assert result.rows[0].perplexity > 1
    assert bitwright.generate(first_qwen["Int8"], "Hi", max_tokens=3, kv_cache="int8")
    assert run(["inspect", str(first_qwen["Int8"]), "--kernels"]) == 0


def test_quantized_it_keeps_its_vocabulary(tmp_path: Path) -> None:
    """The float model, whose quantized form is called a Qwen2."""
    directory, _ = saved(tmp_path / "f", QWEN, vocab_size=960)
    config = (directory / "config.json").read_text()
    write_qwen(directory, learned_ranks(700, 0), chat_format="chatml")
    (directory / "config.json").write_text(config)
    bitwright.quantize(directory, tmp_path / "q", scheme="w4g32", algorithm="rtn")
    before, after = AutoTokenizer.from_pretrained(directory), AutoTokenizer.from_pretrained(tmp_path / "q")
    assert after.encode("The cat") == before.encode("The cat") and after.chat_template == before.chat_template
