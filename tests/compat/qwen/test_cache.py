"""The quantized cache by Qwen's names: functions, layouts, switches, and the document's blocks."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import bitwright.compat.qwen as qwen
from bitwright.core.errors import ArgumentError, BitwrightError, Notice
from bitwright.models.embedded_model import embedded_directory
from bitwright.models.kv_cache import QuantizedCache
from bitwright.models.loading import load

DOCUMENT = Path(__file__).resolve().parents[4] / "shared" / "seeds" / "qwen_quantization.md"


@pytest.fixture(scope="module")
def quantizing() -> Any:
    return qwen.AutoModelForCausalLM.from_pretrained("demo:", use_cache_quantization=True)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return qwen.AutoTokenizer.from_pretrained("demo:")


@pytest.mark.parametrize("shape", [(2, 3, 5, 8), (7, 8), (8,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_codes_are_rounded_and_of_single_tokens(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    v = torch.randn(shape).to(dtype)
    qv, scale, zero_point = qwen.quantize_cache_v(v)
    assert (qv.dtype, qv.shape, scale.shape, zero_point.shape) == (torch.uint8, v.shape, *[(*shape[:-1], 1)] * 2)
    back = qwen.dequantize_cache_torch(qv, scale, zero_point)
    assert bool(((back - v.float()).abs() <= scale / 2 * 1.01 + 1e-6).all())
    exact = v.double() / scale.double() + zero_point.double()
    torch.testing.assert_close(qv.double(), exact.round(), atol=1, rtol=0)
    assert float((qv.double() - exact).abs().mean()) < 0.3  # a cut-off would be 0.5 away


@pytest.mark.parametrize("value", [0.0, 2.0, -1e30, 1e-30, 7.0])
def test_constants_are_exact(value: float) -> None:
    """E2."""
    v = torch.full((1, 2, 3, 4), value)
    assert torch.equal(qwen.dequantize_cache_torch(*qwen.quantize_cache_v(v)), v)
    one = torch.tensor([value])
    assert torch.equal(qwen.dequantize_cache_torch(*qwen.quantize_cache_v(one)), one)


@pytest.mark.parametrize("v", [torch.arange(3), [1.0], torch.tensor(1.0)])
def test_what_is_no_tensor_of_floats_is_refused(v: Any) -> None:
    with pytest.raises(BitwrightError, match="BW201"):
        qwen.quantize_cache_v(v)


def test_both_layouts_of_layer_past(quantizing: Any) -> None:
    """E14."""
    ids = torch.arange(1, 13).view(2, 6)
    plain = qwen.AutoModelForCausalLM.from_pretrained("demo:")
    with torch.no_grad():
        quantized = quantizing(input_ids=ids, use_cache=True).past_key_values
        original = plain(input_ids=ids, use_cache=True).past_key_values
    assert isinstance(quantized, qwen.QwenCache)
    past: Any = qwen.layer_past(quantized)
    floats: Any = qwen.layer_past(original)
    for layer, ((q_key, key_scale, key_zero), (q_value, _, _)) in enumerate(past):
        key, value = floats[layer]
        assert q_key.dtype == torch.uint8
        assert q_key.shape == key.shape
        assert q_value.shape == value.shape
        assert key_scale.shape == key_zero.shape == (*key.shape[:-1], 1)
    (q_key, scale, zero), _ = quantized[0]
    key, _ = floats[0]
    torch.testing.assert_close(qwen.dequantize_cache_torch(q_key, scale, zero), key.float(), atol=0.2, rtol=0.05)
    assert len(list(quantized)) == len(past) == 5


def test_generate_and_chat_use_it(quantizing: Any, tokenizer: Any) -> None:
    ids = tokenizer("Once upon a time", return_tensors="pt")["input_ids"]
    made = quantizing.generate(ids, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
    assert isinstance(made.past_key_values, qwen.QwenCache)
    assert made.past_key_values.get_seq_length() == made.sequences.shape[1] - 1
    response, history = quantizing.chat(tokenizer, "Hi", history=None, max_new_tokens=8)
    plain: Any = qwen.AutoModelForCausalLM.from_pretrained("demo:")
    assert history == [("Hi", response)]
    assert plain.chat(tokenizer, "Hi", history=None, max_new_tokens=8)[0][:4] == response[:4]
    with torch.no_grad():
        assert quantizing(input_ids=ids, use_cache=False).past_key_values is None


def test_a_cache_that_was_replaced_is_not_taken_again(quantizing: Any) -> None:
    """It stays empty: the second call would answer without what the first one read."""
    mine = DynamicCache(config=quantizing.config)
    first, second = torch.tensor([[1, 2, 3]]), torch.tensor([[4, 5]])
    with torch.no_grad():
        output = quantizing(input_ids=first, past_key_values=mine)
        assert mine.get_seq_length() == 0
        with pytest.raises(ArgumentError, match="is empty still") as refused:
            quantizing(input_ids=second, past_key_values=mine)
        assert "output.past_key_values" in refused.value.suggestion
        found = quantizing(input_ids=second, past_key_values=output.past_key_values)
        fresh = quantizing(input_ids=second, past_key_values=DynamicCache(config=quantizing.config))
    assert found.past_key_values.get_seq_length() == 5
    assert not torch.equal(found.logits, fresh.logits)


def test_the_switches_are_taken_from_the_configuration(tmp_path: Path) -> None:
    shutil.copytree(embedded_directory(), tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"use_cache_quantization": True}))
    model: Any = qwen.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert isinstance(model(input_ids=torch.tensor([[1, 2]])).past_key_values, qwen.QwenCache)


def test_flash_attention_is_no_obstacle_any_more(tokenizer: Any) -> None:
    """E18."""
    with pytest.warns(Notice) as told:
        model: Any = qwen.AutoModelForCausalLM.from_pretrained(
            "demo:", use_cache_quantization=True, use_cache_kernel=True, use_flash_attn=True
        )
    for name in ("use_cache_kernel", "use_flash_attn"):
        assert any(name in str(notice.message) for notice in told)
    assert model.chat(tokenizer, "Hi", max_new_tokens=4)[0]
    with pytest.raises(BitwrightError, match="use_cache_quantization is 1"):
        qwen.AutoModelForCausalLM.from_pretrained("demo:", use_cache_quantization=1)  # type: ignore[arg-type]


def test_the_blocks_of_the_document_run() -> None:
    if not DOCUMENT.is_file():
        pytest.skip("no document: it is looked for in a folder 'shared/seeds' beside the repository")
    text = DOCUMENT.read_text(encoding="utf-8")
    blocks = [code for _, code in re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)]
    chosen = [block for block in blocks if any(word in block for word in ("use_cache_quant", "_cache_", "layer_past"))]
    names: dict[str, Any] = {name: getattr(qwen, name) for name in qwen.__all__}
    v = torch.randn(1, 2, 3, 8)
    names |= {"v": v, "key": v, "value": v}
    for block in chosen:
        code = re.sub(r'"Qwen/[\w.-]+"', '"demo:"', textwrap.dedent(block))
        with pytest.warns(Notice) if "from_pretrained" in code else contextlib.nullcontext():
            exec(compile(code, str(DOCUMENT), "exec"), names)
        if "from_pretrained" in code:
            with torch.no_grad():
                past = names["model"](input_ids=torch.tensor([[1, 2, 3]])).past_key_values[0]
            parts = [f"{side}_{part}" for side in ("key", "value") for part in ("q", "scale", "zero_point")]
            names |= dict(zip(parts, [*past[0], *past[1]], strict=True))
            names |= {"q_key": names["key_q"], "q_value": names["value_q"]}
    torch.testing.assert_close(names["v"], v, atol=0.05, rtol=0)
    assert names["layer_past"] == (v, v)
    assert len(chosen) == 5


def test_layer_past_of_a_float_cache_and_of_an_empty_one() -> None:
    model: Any = load("demo:", dtype=torch.float32)
    for scheme in ("none", "int8"):
        with pytest.raises(ArgumentError, match="an empty cache"):
            qwen.layer_past(QuantizedCache(model, scheme))
    cache = QuantizedCache(model, "none")
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]), past_key_values=cache)
    past: Any = qwen.layer_past(cache)[0]
    key, value = past
    whole = cache.stores[0].runs["key"].blocks[0].codes
    assert torch.equal(key, whole)
    assert key.shape == value.shape == (1, 2, 3, 64)
