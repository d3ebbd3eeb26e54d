"""Loading by Qwen's names, and talking to the model."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from bitwright.compat.qwen import AutoModelForCausalLM, AutoTokenizer
from bitwright.core.errors import BitwrightError, Notice
from bitwright.models.loading import load
from bitwright.models.quantized import QuantizedLinear


@pytest.fixture(scope="module")
def model(checkpoints: dict[str, Path]) -> Any:
    return AutoModelForCausalLM.from_pretrained(checkpoints["Int4"], device_map="auto").eval()


@pytest.fixture(scope="module")
def tokenizer(checkpoints: dict[str, Path]) -> Any:
    return AutoTokenizer.from_pretrained(checkpoints["Int4"])


@pytest.mark.parametrize(("name", "bits"), [("Int4", 4), ("Int8", 8)])
def test_gptq_checkpoints_load_and_answer(checkpoints: dict[str, Path], name: str, bits: int) -> None:
    quantization = json.loads((checkpoints[name] / "config.json").read_text())["quantization_config"]
    assert (quantization["quant_method"], quantization["bits"]) == ("gptq", bits)
    loaded: Any = AutoModelForCausalLM.from_pretrained(checkpoints[name], device_map="auto")
    layers = [module for module in loaded.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 35 and {layer.scheme.weight.bits for layer in layers} == {bits}
    tokenizer = AutoTokenizer.from_pretrained(checkpoints[name])
    response, history = loaded.chat(tokenizer, "Hi", history=None)
    assert response.strip() and history == [("Hi", response)]


def test_it_is_the_model_that_load_gives(model: Any, checkpoints: dict[str, Path]) -> None:
    tokens = torch.arange(20).view(1, -1)
    with torch.no_grad():
        assert torch.equal(model(input_ids=tokens).logits, load(checkpoints["Int4"])(input_ids=tokens).logits)


def test_the_history_of_the_caller_is_left_alone(model: Any, tokenizer: Any) -> None:
    """E21."""
    before = [("What is a river?", "A river is water that flows.")]
    kept = copy.deepcopy(before)
    response, after = model.chat(tokenizer, "And a lake?", history=before, max_new_tokens=12)
    assert before == kept and after == [*kept, ("And a lake?", response)] and after is not before
    _, longer = model.chat(tokenizer, "Why?", history=after, max_new_tokens=4)
    assert len(longer) == 3 and len(after) == 2


def test_what_was_said_before_counts(model: Any, tokenizer: Any) -> None:
    answers = {
        model.chat(tokenizer, "Go on.", history=history, max_new_tokens=12)[0]
        for history in (None, [("Tell me of the sea.", "The sea is wide.")], [("Count.", "One, two, three.")])
    }
    assert len(answers) > 1


def test_a_stream_grows_to_the_answer(model: Any, tokenizer: Any) -> None:
    """E21."""
    texts = list(model.chat_stream(tokenizer, "Hi", history=None, max_new_tokens=16))
    assert len(texts) > 1 and all(late.startswith(early) for early, late in pairwise(texts))
    assert texts[-1] == model.chat(tokenizer, "Hi", history=None, max_new_tokens=16)[0]


def test_chat_does_not_stream(model: Any, tokenizer: Any) -> None:
    """E21."""
    with pytest.raises(BitwrightError, match=r"(?s)BW201.*chat_stream"):
        model.chat(tokenizer, "Hi", history=None, stream=True)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"history": "Hi"}, "history is a str"), ({"history": [("a",)]}, "pairs"), ({"history": [("a", 5)]}, "pairs"),
        ({"max_new_tokens": 0}, "max_new_tokens"), ({"temperature": -1}, "temperature"), ({"query": ""}, "prompt"),
    ],
)  # fmt: skip
def test_arguments_are_checked_at_once(model: Any, tokenizer: Any, changes: dict[str, Any], words: str) -> None:
    arguments: dict[str, Any] = {"query": "Hi", "history": None} | changes
    for method in (model.chat, model.chat_stream):
        with pytest.raises(BitwrightError, match=words):
            method(tokenizer, **arguments)


@pytest.mark.parametrize("name", ["torch_dtype", "dtype"])
def test_the_dtype_of_the_activations_is_chosen(checkpoints: dict[str, Path], name: str) -> None:
    arguments: dict[str, Any] = {"device_map": {"": "cpu"}, name: torch.float32}
    assert AutoModelForCausalLM.from_pretrained(checkpoints["Int4"], **arguments).dtype == torch.float32
    assert AutoModelForCausalLM.from_pretrained(checkpoints["Int4"], **{name: "auto"}).dtype == torch.bfloat16  # type: ignore[arg-type]


def test_remote_code_is_never_run(checkpoints: dict[str, Path]) -> None:
    with pytest.warns(Notice, match="never runs code"):
        AutoTokenizer.from_pretrained(checkpoints["Int4"], trust_remote_code=True)


@pytest.mark.parametrize(
    "changes",
    [{"device_map": "cuda:0"}, {"device_map": {"": "cuda"}}, {"torch_dtype": "half"}, {"trust_remote_code": 1}],
)
def test_what_is_not_offered_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(BitwrightError, match="BW201"):
        AutoModelForCausalLM.from_pretrained("demo:", **changes)


def test_a_tokenizer_without_a_template_converses_as_qwen_does(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = copy.deepcopy(tokenizer)
    plain.chat_template = None
    seen: list[str] = []

    def answer(_: object, tokenizer: Any, tokens: list[int], **options: Any) -> list[str]:
        seen.append(tokenizer.decode(tokens))
        return ["ok"]

    monkeypatch.setattr("bitwright.compat.qwen.conversation.stream_text", answer)
    assert model.chat(plain, "Why?", history=[("Hi", "Yes.")]) == ("ok", [("Hi", "Yes."), ("Why?", "ok")])
    assert seen[0] == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )
    model.chat(plain, "Why?", system="Be brief.")
    assert seen[1].startswith("<|im_start|>system\nBe brief.<|im_end|>\n")


def test_an_answer_ends_with_its_turn(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether or not the model's settings say so."""
    whole = model.chat(tokenizer, "Hi", max_new_tokens=16)[0]
    tokens = tokenizer(whole, add_special_tokens=False)["input_ids"]
    vocabulary = tokenizer.get_vocab() | {"<|im_end|>": tokens[3]}
    monkeypatch.setattr(tokenizer, "get_vocab", lambda: vocabulary)
    cut = model.chat(tokenizer, "Hi", max_new_tokens=16)[0]
    assert whole.startswith(cut) and len(cut) < len(whole)
