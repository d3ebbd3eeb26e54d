"""``parse`` and ``.name`` are inverse; what is not a scheme is refused, naming the part."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from bitwright.core.errors import ArgumentError
from bitwright.core.scheme import DYNAMIC_FP8, DYNAMIC_INT8, LayerScheme, QuantScheme
from bitwright.core.scheme_names import DOUBLE_QUANT_PRESETS, NAMED_SCHEMES, parse
from tests.core.strategies import layer_schemes, schemes


@given(layer_schemes())
@example(LayerScheme(weight=parse("w4g32-dq").weight, activation=DYNAMIC_INT8))
def test_parse_is_the_inverse_of_name(scheme: LayerScheme) -> None:
    assert parse(scheme.name) == scheme
    assert parse(f" {scheme.name.upper()} ") == scheme


@given(schemes())
def test_parse_is_the_inverse_of_a_weight_name(scheme: QuantScheme) -> None:
    assert parse(scheme.name) == LayerScheme(weight=scheme)


@given(layer_schemes(), layer_schemes())
def test_different_schemes_have_different_names(one: LayerScheme, other: LayerScheme) -> None:
    assert (one == other) == (one.name == other.name)


@pytest.mark.parametrize(
    ("name", "weight"),
    [
        ("w4g128", QuantScheme(bits=4, group=128)),
        ("w4g128-asym", QuantScheme(code="uint", bits=4, group=128, symmetric=False)),
        ("w4g128-sym", QuantScheme(bits=4, group=128)),
        ("w8", QuantScheme(bits=8, group=None)),
        ("W3G32", QuantScheme(bits=3, group=32)),
        ("nf4g64", QuantScheme(code="nf4", group=64)),
        ("fp4", QuantScheme(code="fp4_bnb", group=None)),
        ("fp4e2m1g32", QuantScheme(code="fp4_e2m1", group=32)),
        ("fp8", QuantScheme(code="fp8_e4m3", bits=8, group=None)),
        ("w2g16-axis0-sbf16", QuantScheme(bits=2, group=16, axis=0, scale_dtype=torch.bfloat16)),
        ("nf4g64-dq", QuantScheme(code="nf4", group=64, scale_scheme=DOUBLE_QUANT_PRESETS["bnb"])),
        ("w4g32-dq(ggml)", QuantScheme(group=32, scale_scheme=DOUBLE_QUANT_PRESETS["ggml"])),
    ],
)
def test_documented_names(name: str, weight: QuantScheme) -> None:
    assert parse(name) == LayerScheme(weight=weight)


@pytest.mark.parametrize(
    ("name", "code", "bits"), [("A16W8", "int", 8), ("A16W4", "uint", 4), ("A8W8", "int", 8), ("A8W4", "uint", 4)]
)
def test_instant_names(name: str, code: str, bits: int) -> None:
    layer = parse(name)
    assert (layer.weight.code, layer.weight.bits, layer.weight.group, layer.weight.zero) == (code, bits, None, "float")
    assert layer.weight.scale_dtype == torch.float32
    assert layer.activation == (DYNAMIC_INT8 if name.startswith("A8") else None)


@pytest.mark.parametrize("name", ["A16W8g64", "a16w4g128"])
def test_instant_names_per_group(name: str) -> None:
    base, _, group = name.lower().partition("g")
    assert parse(name).weight == QuantScheme(**{**vars_of(parse(base).weight), "group": int(group)})


def vars_of(scheme: QuantScheme) -> dict[str, object]:
    return {name: getattr(scheme, name) for name in QuantScheme.__dataclass_fields__}


def test_w8a8_is_symmetric_with_dynamic_activations() -> None:
    for name, bits in (("w8a8", 8), ("w4a8", 4)):
        assert parse(name).weight.symmetric and parse(name).weight.bits == bits and parse(name).weight.group is None
        assert parse(name).activation == DYNAMIC_INT8


@pytest.mark.parametrize("name", ["fp8-afp8", "w4g128-afp8", "w4g32-asym-afp8"])
def test_e4m3_activations_go_with_e4m3_and_4_bit_weights(name: str) -> None:
    scheme = parse(name)
    assert scheme.activation == DYNAMIC_FP8 != DYNAMIC_INT8 and scheme.weight == parse(name[:-5]).weight
    assert scheme.name.endswith("-afp8") and parse(scheme.name) == scheme


@pytest.mark.parametrize(
    "name", ["w4g32-a8g32", "w8g128-a8g128", "w8-a8g64", "w4g128-asym-a8g32", "w4g32-asym-fz-a8g96"]
)
def test_groups_of_activations(name: str) -> None:
    weight, _, group = name.partition("-a8g")
    scheme = parse(name.upper())
    assert scheme.name == name and scheme.weight == parse(weight).weight
    assert scheme.activation == replace(DYNAMIC_INT8, group=int(group)) and scheme.activation_group == int(group)


def test_the_order_of_the_parts_does_not_matter() -> None:
    for base, parts in (("w4g32", ["asym", "signed", "sf32", "dq"]), ("w8", ["asym", "fz", "a8g32"])):
        assert len({parse("-".join([base, *order])) for order in permutations(parts)}) == 1


@pytest.mark.parametrize("name", sorted(NAMED_SCHEMES))
def test_named_schemes_have_plain_names_too(name: str) -> None:
    assert parse(NAMED_SCHEMES[name].name) == NAMED_SCHEMES[name] == parse(name.upper())


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("", "''"),
        ("w", "'w'"),
        ("w9", "bits is 9"),
        ("w17", "bits is 17"),
        ("w0", "bits is 0"),
        ("w4g0", "group is 0"),
        ("w4g", "'w4g'"),
        ("w4g-1", "'w4g'"),
        ("int4", "'int4'"),
        ("w4g128-foo", "'foo'"),
        ("w4g128-", "unknown part ''"),
        ("w4--asym", "unknown part ''"),
        ("w4-fz", "zero is 'float'"),
        ("w4-sym-asym", "asym and sym contradict"),
        ("w4-sym-signed", "contradict"),
        ("w4-sf32-sbf16", "contradict"),
        ("nf4g64-asym", "neither asym nor signed"),
        ("nf4-signed", "neither asym nor signed"),
        ("fp8-asym", "neither asym nor signed"),
        ("nf4-a8", "8-bit activations cannot"),
        ("w4-axis0-a8", "8-bit activations cannot"),
        ("w4-a8-afp8", "contradict"),
        ("w4-a8-a8g32", "a8 and a8g32 contradict"),
        ("w4-a8g32-a8g64", "contradict"),
        ("w4-a8g32-afp8", "contradict"),
        ("w4-a8g0", "group is 0"),
        ("w4-a8g", "unknown part 'a8g'"),
        ("w4-a8g-1", "unknown part 'a8g'"),
        ("w4g128-a8g96", "groups of 96 cannot be combined with weights in groups of 128"),
        ("nf4-a8g32", "8-bit activations cannot"),
        ("w4g32-axis0-a8g32", "8-bit activations cannot"),
        ("fp8-afp8g32", "unknown part"),
        ("nf4-afp8", "fp8 activations cannot"),
        ("fp8g32-afp8", "fp8 activations cannot"),
        ("w8-afp8", "fp8 activations cannot"),
        ("w4-asym-fz-afp8", "fp8 activations cannot"),
        ("w4-axis0-afp8", "fp8 activations cannot"),
        ("w4-dq(w8a8)", "scales have no activations"),
        ("w4-dq(w8-dq)", "one level of double quantization"),
        ("w4-dq(foo)", "'foo'"),
        ("w4-dq(w8-dq(w8))", "unknown part"),
        ("w4-dq-dq", "unknown part 'dq'"),
        ("w" + "9" * 5000, "cannot read"),
        ("w4g" + "9" * 5000, "cannot read"),
        ("w٤", "cannot read"),
    ],
)
def test_what_is_not_a_scheme_is_refused(text: str, quoted: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse(text)
    assert quoted in str(caught.value) and caught.value.code == "BW202"


@given(st.text(alphabet="wag0123456789-nfpdqsym()ibx ", max_size=24))
def test_any_text_is_a_scheme_or_a_clear_refusal(text: str) -> None:
    try:
        scheme = parse(text)
    except ArgumentError:
        return
    assert parse(scheme.name) == scheme


@pytest.mark.parametrize(
    ("text", "told"),
    [("w4-sym-asym", "keep one of asym, sym"), ("nf4-asym", "drop -asym"), ("w4g32-dq(w8g256-a8)", "put -a8 outside")],
)
def test_contradictions_say_what_to_change(text: str, told: str) -> None:
    with pytest.raises(ArgumentError) as caught:
        parse(text)
    assert caught.value.code == "BW202" and told in caught.value.suggestion
