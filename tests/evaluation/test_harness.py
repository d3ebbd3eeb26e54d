"""lm-eval's view of a model, and a small task of our own in its format."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import bitwright
from bitwright.cli import main
from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.models.embedded_model import embedded_directory, read_text
from bitwright.models.hf import load_tokenizer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    instances = pytest.importorskip("lm_eval.api.instance", reason="lm-eval is not installed (bitwright[harness])")
    harness = pytest.importorskip("bitwright.evaluation.harness")

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and its libraries
NAME = "bitwright_colours"


def request(kind: str, *arguments: Any) -> Any:
    return instances.Instance(request_type=kind, doc={}, arguments=arguments, idx=0)


@pytest.fixture(scope="module")
def model() -> Any:
    return harness.HarnessModel(
        bitwright.load("demo:", dtype=torch.float32), tokenizer=load_tokenizer(embedded_directory())
    )


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Which word goes on: a multiple choice, and one answer to write."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [{"question": "Once upon a time there was a", "choices": [" zq xx", " little"], "answer": 1}] * 6
    (folder / "colours.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "colours.yaml").write_text(
        f"""
task: {NAME}
dataset_path: json
dataset_kwargs:
  data_files:
    validation: {folder / "colours.jsonl"}
output_type: multiple_choice
validation_split: validation
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
    )
    return folder


def test_log_likelihoods_are_the_models(model: Any) -> None:
    pairs = [("Once upon a time", " there was"), ("The fox", " ran"), ("", "The fox ran"), ("A", " dog and a cat")]
    found = model.loglikelihood([request("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (value, is_greedy) in zip(pairs, found, strict=True):
        first = model.tok_encode(context) if context else [model.prefix_token_id]
        whole = torch.tensor([[*first, *model.tok_encode(context + continuation)[len(first) if context else 0 :]]])
        with torch.no_grad():
            chances = model.model(input_ids=whole).logits[0, :-1].double().log_softmax(-1)
        rows, targets = torch.arange(len(first) - 1, whole.shape[1] - 1), whole[0, len(first) :]
        assert value == pytest.approx(float(chances[rows, targets].sum()), abs=1e-3)
        assert is_greedy == bool((chances[rows].argmax(-1) == targets).all())


def test_whole_texts_longer_than_the_context(model: Any) -> None:
    text = read_text("heldout")[:4000]
    tokens = model.tok_encode(text, add_special_tokens=False)
    assert len(tokens) > 512
    (found,) = model.loglikelihood_rolling([request("loglikelihood_rolling", text)], disable_tqdm=True)
    assert -2 * len(tokens) < found < -0.5 * len(tokens)
    halves = (text[: len(text) // 2], text[len(text) // 2 :])
    apart = sum(model.loglikelihood_rolling([request("loglikelihood_rolling", half) for half in halves]))
    assert found == pytest.approx(apart, rel=0.15)


def test_answers_end_before_a_stop(model: Any) -> None:
    whole = model.generate_until([request("generate_until", "Once upon a time", {"until": [], "max_gen_toks": 20})])[0]
    stop = whole[10:14]
    (found,) = model.generate_until(
        [request("generate_until", "Once upon a time", {"until": stop, "max_gen_toks": 20})]
    )
    assert found == whole[: whole.find(stop)]
    assert found


def test_a_cache_is_read_through() -> None:
    loaded, tokenizer = bitwright.load("demo:", dtype=torch.float32), load_tokenizer(embedded_directory())
    values = []
    for scheme in ("none", "int8", "int2-channel4"):
        model = harness.HarnessModel(loaded, tokenizer=tokenizer, kv_cache=scheme)
        ((value, _),) = model.loglikelihood([request("loglikelihood", "Once upon a time", " there was a little girl")])
        assert model.generate_until([request("generate_until", "The fox", {"max_gen_toks": 3})])[0]
        values.append(value)
    assert 0 < abs(values[1] - values[0]) < 0.01 < abs(values[2] - values[0])


def test_a_model_in_memory_needs_a_tokenizer() -> None:
    with pytest.raises(ArgumentError, match="its tokenizer"):
        harness.HarnessModel(bitwright.load("demo:"))


@pytest.mark.slow
def test_tasks_are_columns_of_the_one_table(tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tasks / "text.txt"
    text.write_text(read_text("heldout")[:3000])
    command = ["eval", "demo:", "--kv-cache", "none,int8", "--tasks", NAME, "--task-path", str(tasks)]
    assert main([*command, "--task-limit", "4", "--text", str(text), "--no-probes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert [(row["name"], row["tasks"]) for row in rows] == [("demo: kv=int8", {NAME: 1.0}), ("demo:", {NAME: 1.0})]


@pytest.mark.slow
def test_tasks_that_are_not_there(tasks: Path) -> None:
    model, tokenizer = bitwright.load("demo:"), load_tokenizer(embedded_directory())
    with pytest.raises(BitwrightError) as refused:
        harness.run_tasks(model, tokenizer, ["no_such_task_at_all"], path=tasks)
    assert refused.value.code == "BW402"
