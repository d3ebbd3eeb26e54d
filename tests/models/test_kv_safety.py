"""Before few bits are served: layers that they would spoil are named, and widened on request, wherever models run."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from bitwright import Engine
from bitwright.cli import main
from bitwright.core.errors import ArgumentError, Notice
from bitwright.core.kv_scheme import parse_kv
from bitwright.models.embedded_model import embedded_directory, read_text
from bitwright.models.generation import generate
from bitwright.models.hf import load_tokenizer
from bitwright.models.kv_cache import QuantizedCache
from bitwright.models.kv_safety import has_few_bits, judge
from bitwright.models.kv_trial import safe_scheme
from bitwright.models.loading import load
from tests.models.biased_keys import LAYER, NORM, model_with_biased_keys

ROOM = 1 << 22  # bytes of an engine's cache
UNSAFE = f"layer {LAYER}: keys share an offset of norm {NORM:.0f}"


@pytest.fixture(scope="module")
def biased() -> Any:
    return model_with_biased_keys()


def agreement(model: Any, scheme: str, ids: Tensor) -> float:
    with torch.no_grad():
        plain = model(input_ids=ids).logits.argmax(-1)
        cache = QuantizedCache(model, scheme, kv_safety="off")
        return float((model(input_ids=ids, past_key_values=cache).logits.argmax(-1) == plain).float().mean())


def text(tokens: int = 1024) -> Tensor:
    ids = load_tokenizer(embedded_directory())(read_text("heldout")[:20000])["input_ids"]
    return torch.tensor(ids[2000 : 2000 + tokens]).view(2, -1)


@pytest.mark.parametrize("name", ["int4", "int4-rotated", "k(int4)v(int8)"])
def test_the_layer_is_named_and_what_is_recommended_is_safe(name: str) -> None:
    model = model_with_biased_keys()
    with pytest.warns(Notice, match=UNSAFE) as told:
        assert safe_scheme(model, parse_kv(name)) == parse_kv(name)
    assert "kv_safety='widen'" in str(told[0].message)
    widened = safe_scheme(model, parse_kv(name), "widen")
    assert list(widened.overrides) == [LAYER]
    assert widened.at(LAYER).key.bits == 8
    assert widened.at(LAYER).value == parse_kv(name).value
    assert widened.name in str(told[0].message)


def test_naive_codes_fail_and_widened_ones_do_not(biased: Any) -> None:
    ids, widened = text(), {}
    for name in ("int4", "int4-rotated"):
        with pytest.warns(Notice, match="is used in place of"):
            widened[name] = safe_scheme(biased, parse_kv(name), "widen").name
    assert agreement(biased, "int4", ids) < 0.95 <= agreement(biased, widened["int4"], ids)
    assert agreement(biased, widened["int4-rotated"], ids) >= 0.95


def test_codes_of_channels_do_not_mind_an_offset(biased: Any) -> None:
    assert safe_scheme(biased, parse_kv("int2")) == parse_kv("int2")
    assert agreement(biased, "int2", text()) >= 0.95


@pytest.mark.parametrize("name", ["int4", "int4-rotated", "int2", "k8v4", "int8", "none", "fp8"])
def test_a_usual_model_is_left_alone(name: str) -> None:
    model: Any = load("demo:", dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert safe_scheme(model, parse_kv(name), "widen") == parse_kv(name)
        assert QuantizedCache(model, name).scheme == parse_kv(name)


def test_more_bits_are_not_tried(biased: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [has_few_bits(parse_kv(name)) for name in ("int8", "fp8", "k8v4", "none/3:int4")] == [
        False,
        False,
        True,
        True,
    ]
    calls: list[int] = []
    monkeypatch.setattr("bitwright.models.kv_trial.observe_model", lambda *given: calls.append(1))
    safe_scheme(biased, parse_kv("int8"))
    safe_scheme(model_with_biased_keys(), parse_kv("int4"), "off")
    assert not calls


def test_it_is_tried_and_told_once() -> None:
    model = model_with_biased_keys()
    with pytest.warns(Notice) as told:
        assert [QuantizedCache(model, "int4").nbytes for _ in range(3)] == [0, 0, 0]
    assert len(told) == 1
    with pytest.warns(Notice) as told:
        caches = [QuantizedCache(model_with_biased_keys(), "int4", kv_safety="widen")]
    assert "is used in place of int4" in str(told[0].message)
    assert caches[0].scheme.at(LAYER).key.bits == 8


def test_generate_tries_it(biased: Any) -> None:
    tokenizer = load_tokenizer(embedded_directory())
    model = model_with_biased_keys()
    with pytest.warns(Notice, match=UNSAFE):
        generate(model, "The fox", max_tokens=2, kv_cache="int4", tokenizer=tokenizer)
    with pytest.raises(ArgumentError, match="kv_safety is 'maybe'"):
        generate(model, "The fox", max_tokens=2, kv_cache="int4", kv_safety="maybe", tokenizer=tokenizer)


@pytest.mark.parametrize("decoder", ["torch", "auto"])
def test_the_engine_tries_it(decoder: str) -> None:
    tokenizer = load_tokenizer(embedded_directory())
    with pytest.warns(Notice, match=UNSAFE):
        engine = Engine(
            model_with_biased_keys(), tokenizer=tokenizer, kv_cache="int4", cache_memory=ROOM, decoder=decoder
        )
    assert engine.kv_cache == parse_kv("int4")
    narrow = engine.pages
    engine.close()
    with pytest.warns(Notice, match="is used in place of int4"):
        engine = Engine(
            model_with_biased_keys(),
            tokenizer=tokenizer,
            kv_cache="int4",
            kv_safety="widen",
            cache_memory=ROOM,
            decoder=decoder,
        )
    assert engine.kv_cache.at(LAYER).key.bits == 8
    assert engine.pages < narrow
    assert engine.generate("The fox", max_tokens=3).text
    engine.close()
    with pytest.raises(ArgumentError, match="kv_safety is 1"):
        Engine("demo:", kv_cache="int4", kv_safety=1)  # type: ignore[arg-type]


def test_weights_that_are_not_in_memory_are_told_not_passed_over() -> None:
    model: Any = load("demo:", dtype=torch.float32)
    model.model.layers[3].mlp.to("meta")
    with pytest.warns(Notice, match="was not tried: model.layers.3.mlp") as told:
        assert [safe_scheme(model, parse_kv("int4"), safety) for safety in ("warn", "widen")] == [parse_kv("int4")] * 2
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert safe_scheme(model, parse_kv("int4-rotated"), "off") == parse_kv("int4-rotated")
        assert safe_scheme(model, parse_kv("int8")) == parse_kv("int8")


def test_one_head_of_many_is_enough() -> None:
    x = torch.randn(16, 96, 64, generator=torch.Generator().manual_seed(0))
    x[3, :, 7] += 45
    found = judge({"key": [x], "value": [torch.randn_like(x)]}, parse_kv("int4"))
    assert found.layers == (0,)
    assert 10 < found.unsafe[0].times < 160


def test_outliers_of_values_widen_both_sides() -> None:
    x = torch.randn(2, 96, 64, generator=torch.Generator().manual_seed(0))
    spiked = x.clone()
    spiked[1, :, 5] += 100
    found = judge({"key": [x, x], "value": [x, spiked]}, parse_kv("int4"))
    assert found.layers == (1,)
    assert (found.recommended.at(1).key.bits, found.recommended.at(1).value.bits) == (8, 8)
    assert found.recommended.at(0) == parse_kv("int4").at(0)
    assert "values share an offset of norm 100" in str(found.unsafe[0])


def test_the_commands_say_it(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_with_biased_keys()
    model.save_pretrained(tmp_path / "m")
    load_tokenizer(embedded_directory()).save_pretrained(tmp_path / "m")
    command = ["generate", str(tmp_path / "m"), "The fox", "--max-tokens", "2", "--kv-cache", "int4"]
    assert main(command) == 0
    assert UNSAFE in capsys.readouterr().err
    assert main([*command, "--kv-safety", "widen"]) == 0
    assert "used in place of int4" in capsys.readouterr().err
    assert main([*command, "--kv-safety", "off"]) == 0
    assert capsys.readouterr().err == ""
    assert main([*command, "--kv-safety", "perhaps"]) == 2
    assert "accepted: warn, widen, off" in capsys.readouterr().err
