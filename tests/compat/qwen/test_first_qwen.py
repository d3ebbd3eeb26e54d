"""The models that Qwen's document names: the first Qwen, its GPTQ checkpoints, its own vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import bitwright
from bitwright.compat.dashinfer.adaptation import adapt
from bitwright.compat.qwen import AutoModelForCausalLM, AutoTokenizer
from bitwright.core.errors import Notice
from bitwright.models.quantized import QuantizedLinear


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
