"""Which scheme a layer gets: precedence, anchoring, the output head."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.recipe import FLOAT, OUTPUT_HEADS, Override, Recipe, parse_override
from bitwright.core.scheme_names import parse

NAMES = [f"model.layers.{layer}.{part}" for layer in (0, 1, 10) for part in ("mlp.fc1", "mlp.fc10", "attn.q_proj")]
LAYERS = [(name, "Linear") for name in NAMES] + [("transformer.h.0.c_attn", "Conv1D"), ("lm_head", "Linear")]


def recipe(*overrides: str, scheme: str = "w4g32") -> Recipe:
    return Recipe(scheme=parse(scheme), overrides=tuple(parse_override(text) for text in overrides))


def chosen(made: Recipe, name: str, type_name: str = "Linear") -> str:
    layer = made.scheme_for(name, type_name)
    return layer.name if layer else FLOAT


def test_w12_the_last_name_rule_wins() -> None:
    made = recipe(r".*fc1=w8", r".*layers\.0.*=w3", r".*\.0\.mlp\.fc1=w2")
    assert chosen(made, "model.layers.0.mlp.fc1") == "w2"
    assert chosen(made, "model.layers.0.attn.q_proj") == "w3"
    assert chosen(made, "model.layers.1.mlp.fc1") == "w8"
    assert chosen(made, "model.layers.1.attn.q_proj") == "w4g32"


def test_w12_type_rules_are_below_name_rules_whatever_their_order() -> None:
    for order in (("type:Linear=w2", ".*fc1=w8"), (".*fc1=w8", "type:Linear=w2")):
        assert chosen(recipe(*order), "model.layers.0.mlp.fc1") == "w8"
        assert chosen(recipe(*order), "model.layers.0.attn.q_proj") == "w2"
        assert chosen(recipe(*order), "transformer.h.0.c_attn", "Conv1D") == "w4g32"


def test_w12_exact_names_beat_expressions_whatever_their_order() -> None:
    exact, expression = "model.layers.0.mlp.fc1=w8", ".*fc1=w2"
    for order in ((exact, expression), (expression, exact)):
        assert chosen(recipe(*order), "model.layers.0.mlp.fc1") == "w8"
        assert chosen(recipe(*order), "model.layers.1.mlp.fc1") == "w2"


def test_w12_patterns_match_the_whole_name() -> None:
    made = recipe(r".*fc1=w8", r"fc10=w2", r"model\.layers\.1=w3")
    assert chosen(made, "model.layers.0.mlp.fc1") == "w8"
    assert chosen(made, "model.layers.0.mlp.fc10") == "w4g32"
    assert chosen(made, "model.layers.1.attn.q_proj") == "w4g32"
    with pytest.raises(BitwrightError, match="BW208"):
        made.check_overrides(LAYERS)


@pytest.mark.parametrize("head", OUTPUT_HEADS)
def test_w14_the_head_stays_float_without_a_rule_and_obeys_one(head: str) -> None:
    assert chosen(recipe(), head) == FLOAT
    assert chosen(recipe("type:Linear=w2"), head) == FLOAT  # a type rule does not name it
    assert chosen(recipe(f"{head}=w8"), head) == "w8"
    assert chosen(recipe(".*head.*=w8", ".*out.*=w8", ".*embed.*=w8"), head) == "w8"
    assert chosen(recipe(f"{head}=w8", f"{head}=float"), head) == FLOAT


def test_float_leaves_a_layer_alone() -> None:
    made = recipe(".*q_proj=float", "type:Conv1D=FLOAT")
    assert chosen(made, "model.layers.1.attn.q_proj") == FLOAT
    assert chosen(made, "transformer.h.0.c_attn", "Conv1D") == FLOAT


@given(st.lists(st.sampled_from([r".*", r".*fc1", r".*layers\.1\..*", NAMES[0], NAMES[5], "type:Linear"]), max_size=5))
def test_w12_precedence_restated(patterns: list[str]) -> None:
    """The winner is the first of: last exact name, last matching name rule, last type rule, the default."""
    texts = [f"{pattern}=w{number + 1}" for number, pattern in enumerate(patterns)]
    made = recipe(*texts)
    for name in NAMES:
        exact = [number for number, pattern in enumerate(patterns) if pattern == name]
        named = [number for number, pattern in enumerate(patterns) if re.fullmatch(pattern, name)]
        typed = [number for number, pattern in enumerate(patterns) if pattern == "type:Linear"]
        winners = exact or named or typed
        assert chosen(made, name) == (f"w{winners[-1] + 1}" if winners else "w4g32")


def test_overrides_that_match_nothing_are_refused_with_the_nearest() -> None:
    recipe("type:Conv1D=w8", "lm_head=w8", ".*fc1=w2").check_overrides(LAYERS)
    for text, near in (("model.layers.0.mlp.fc2=w8", "model.layers.0.mlp.fc1"), ("type:Conv2D=w8", "Conv1D")):
        with pytest.raises(BitwrightError, match="matches no") as caught:
            recipe(text).check_overrides(LAYERS)
        assert near in str(caught.value) and caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("text", "pattern", "scheme", "is_type"),
    [
        ("lm_head=w8", "lm_head", "w8", False),
        ("type:Linear=nf4g32", "Linear", "nf4g32", True),
        (r"a=b.*=w4g32-dq(w8g256-asym-sf32)", "a=b.*", "w4g32-dq(w8g256-asym-sf32)", False),
        ("x=float", "x", FLOAT, False),
    ],
)
def test_overrides_are_read(text: str, pattern: str, scheme: str, is_type: bool) -> None:
    override = parse_override(text)
    assert (override.pattern, override.is_type) == (pattern, is_type)
    assert (override.scheme.name if override.scheme else FLOAT) == scheme


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("x=w4@gptq", {}),
        ("x=w4@gptq()", {}),
        ("x=w4@gptq(damp=0.05)", {"damp": 0.05}),
        (
            "x=w4@gptq(damp=0.05, act_order=false,search=auto)",
            {"damp": 0.05, "act_order": False, "search": "auto"},
        ),
        (r"(?=x).*=w4g32-dq(w8g256-asym-sf32)@awq+gptq(awq.grid=4)", {"awq.grid": 4}),
        ('x=w4@gptq(search="a,b",damp=1)', {"search": "a,b", "damp": 1}),
        ("x=w4@gptq(name=[1,2])", {"name": [1, 2]}),
        (" x=w4 @ gptq ( damp = 0.05 , act_order = null ) ", {"damp": 0.05, "act_order": None}),
    ],
)
def test_overrides_have_options_of_their_own(text: str, options: dict[str, object]) -> None:
    override = parse_override(text)
    assert override.scheme is not None and override.algorithm in ("gptq", "awq+gptq")
    assert override.options == options and override.pattern in ("x", "(?=x).*")


@pytest.mark.parametrize(
    ("text", "code", "quoted"),
    [
        ("lm_head", "BW201", "'lm_head'"),
        ("=w8", "BW201", "'=w8'"),
        ("", "BW201", "''"),
        ("(=w8", "BW201", "not a regular expression"),
        ("*down_proj=w8", "BW201", r".*\.down_proj"),
        ("lm_head=w99", "BW202", "bits is 99"),
        ("lm_head=", "BW202", "cannot read ''"),
        ("x=w4@gptq(damp=0.05", "BW201", "'x=w4@gptq(damp=0.05'"),
        ("x=w4@gptq(damp=0.05,act_order=false", "BW201", "OPTION=VALUE"),
        ("x=w4@gptq:damp=0.05", "BW201", "'x=w4@gptq:damp=0.05'"),
        ("x=w4@gptq[damp=0.05]", "BW201", "'x=w4@gptq[damp=0.05]'"),
        ("x=w4g32-dq(w8g256-asym-sf32)@gptq(damp=0.05", "BW201", "OPTION=VALUE"),
        ("x=w4@gptq(damp)", "BW201", "override 'x=w4@gptq(damp)': cannot read option 'damp'"),
        ("x=w4@gptq(damp=1,damp=2)", "BW201", "option damp is given twice"),
    ],
)
def test_w16_bad_overrides_are_refused_at_once(text: str, code: str, quoted: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse_override(text)
    assert caught.value.code == code and quoted in str(caught.value)


def test_records_are_json_and_say_everything() -> None:
    made = Recipe(
        scheme=parse("w4g128"),
        algorithm="rtn",
        options={"search": True},
        overrides=(parse_override("lm_head=w8"), Override(pattern="Conv1D", scheme=None, is_type=True)),
        seed=3,
    )
    record = json.loads(json.dumps(made.to_dict()))
    assert record == {
        "algorithm": "rtn",
        "options": {"search": True},
        "scheme": "w4g128",
        "overrides": [
            {"pattern": "lm_head", "type": False, "scheme": "w8"},
            {"pattern": "Conv1D", "type": True, "scheme": "float"},
        ],
        "seed": 3,
    }


def test_options_of_an_override_change_those_of_the_same_algorithm() -> None:
    rules = ("a=w4@gptq", "b=w4@gptq(damp=0.5)", "c=w4@awq+gptq(gptq.damp=0.5)", "d=w8")
    made = Recipe(
        scheme=parse("w4"),
        algorithm="gptq",
        options={"damp": 0.1, "search": "auto"},
        overrides=tuple(map(parse_override, rules)),
    )
    found = {name: made.choice_for(name, "Linear") for name in "abcd"}
    assert {name: (choice.algorithm, choice.options) for name, choice in found.items() if choice} == {
        "a": ("gptq", {"damp": 0.1, "search": "auto"}),
        "b": ("gptq", {"damp": 0.5, "search": "auto"}),
        "c": ("awq+gptq", {"gptq.damp": 0.5}),
        "d": ("gptq", {"damp": 0.1, "search": "auto"}),
    }
