"""The benchmark of cache schemes: what its probes ask, and that renewing them leaves the rest of the record alone."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from benchmarks import kv_quality
from bitwright.evaluation.probes import probe_counts, right_answers
from bitwright.models.embedded_model import embedded_directory, read_text
from bitwright.models.loading import load

PROBED = ("embedded", "wikitext-qwen2-6m")


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((kv_quality.RESULTS / "kv_quality.json").read_text(encoding="utf-8"))
    return found


def test_the_embedded_model_is_asked_what_stands_in_the_prompt() -> None:
    probes = kv_quality.probes_of("embedded", embedded_directory(), "")
    assert probe_counts(probes) == {"qa": 200, "recall": 200, "copy": 200}


def test_other_models_are_asked_what_comes_next_in_a_passage_that_begins_again() -> None:
    probes = kv_quality.probes_of("another", embedded_directory(), read_text("heldout"))
    assert probe_counts(probes) == {"repeat": kv_quality.PASSAGES}
    for probe in probes:
        assert len(probe.tokens) == 256  # the shortest context of the models
        again = probe.tokens[kv_quality.PASSAGE :]
        assert torch.equal(again, probe.tokens[: len(again)])
        assert probe.answer == 1


def test_probes_are_asked_through_the_cache() -> None:
    """A float cache answers as none does, each batch through a new one; one that forgets does not."""
    model: Any = load("demo:", dtype=torch.float32)
    probes = kv_quality.probes_of("embedded", embedded_directory(), "")[200:420:10]
    made: list[DynamicCache] = []

    def make() -> DynamicCache:
        made.append(DynamicCache(config=model.config))
        return made[-1]

    wanted = right_answers(model, probes)
    assert right_answers(kv_quality.ReadThrough(model, make), probes) == wanted
    assert made and all(cache.get_seq_length() > 0 for cache in made)

    class Forgetful(DynamicCache):
        def update(self, key_states: Any, value_states: Any, *arguments: Any, **keywords: Any) -> Any:
            return super().update(key_states, torch.zeros_like(value_states), *arguments, **keywords)

    forgetful = kv_quality.ReadThrough(model, lambda: Forgetful(config=model.config))
    assert sum(right_answers(forgetful, probes).values()) < sum(wanted.values()) / 2


def test_renewed_probes_leave_all_other_rows_alone(record: dict[str, Any]) -> None:
    known = copy.deepcopy(record["models"][0])
    rows = {name: {"probes": {"recall": 3}} for name in ("bf16", *kv_quality.OURS)}
    found = {"model": known["model"], "probes": {"recall": 5}, "probes_right": {"recall": 4}, "rows": rows}
    merged = kv_quality.with_probes(known, [found])
    assert merged["probes_right"] == {"recall": 4}
    assert list(merged["rows"]) == list(record["models"][0]["rows"])
    for name, row in record["models"][0]["rows"].items():
        assert merged["rows"][name] == row | ({"probes": {"recall": 3}} if name in rows else {})
    assert kv_quality.with_probes(known, []) == record["models"][0]
    text = kv_quality.render([merged])
    assert "Probes that the float cache answers right: 4 of 5 recall." in text
    assert "| KL p99 | top-1 | recall |" in text


def test_the_record_has_answers_of_every_scheme_of_ours(record: dict[str, Any]) -> None:
    models = {each["model"]: each for each in record["models"]}
    for name in PROBED:
        model = models[name]
        assert sum(model["probes_right"].values()) > 0.2 * sum(model["probes"].values())
        for scheme in ("bf16", *kv_quality.OURS):
            answers = model["rows"][scheme]["probes"]
            assert set(answers) == set(model["probes"])
            assert all(0 <= answers[kind] <= count for kind, count in model["probes"].items())
        kept = sum(model["rows"]["int8"]["probes"].values())
        assert abs(kept - sum(model["probes_right"].values())) <= 0.02 * sum(model["probes"].values())
        assert {"llama.cpp q4_0", "transformers hqq 4"} <= set(model["rows"])
