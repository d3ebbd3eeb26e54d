"""Schemes are checked when they are made, and every refusal names the field."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from hypothesis import given

from bitwright.core.errors import ArgumentError
from bitwright.core.scheme import DYNAMIC_FP8, DYNAMIC_INT8, LayerScheme, QuantScheme
from bitwright.core.scheme_names import parse
from tests.core.strategies import schemes


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("code", "int99"),
        ("code", None),
        ("bits", 17),
        ("bits", 0),
        ("bits", 4.0),
        ("bits", True),
        ("bits", "4"),
        ("group", 0),
        ("group", -1),
        ("group", 32.0),
        ("axis", 2),
        ("axis", -1),
        ("symmetric", None),
        ("symmetric", 1),
        ("zero", "int"),
        ("scale_dtype", torch.float64),
        ("scale_dtype", "float16"),
        ("scale_scheme", "w8"),
        ("scale_scheme", LayerScheme(weight=QuantScheme())),
    ],
)
def test_w16_values_out_of_range_are_refused_at_construction(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"scheme field {field} is") as caught:
        QuantScheme(**{field: value})
    assert isinstance(caught.value, ArgumentError) and caught.value.code == "BW202" and caught.value.exit_status == 2
    assert "accepted:" in str(caught.value)


def test_w16_unknown_fields_are_refused_by_name() -> None:
    with pytest.raises(TypeError, match="group_size"):
        QuantScheme(group_size=128)  # type: ignore[call-arg]
    with pytest.raises(TypeError):
        QuantScheme("int", 4)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"code": "nf4", "bits": 3}, "bits"),
        ({"code": "fp8_e4m3", "bits": 4}, "bits"),
        ({"code": "nf4", "symmetric": False}, "symmetric"),
        ({"code": "uint"}, "symmetric"),
        ({"zero": "float"}, "zero"),
        ({"scale_scheme": parse("w8-dq").weight}, "one level of double quantization"),
        ({"scale_scheme": parse("nf4").weight}, "scale_scheme"),
        ({"scale_scheme": parse("w8g4-axis0").weight}, "scale_scheme"),
    ],
)
def test_combinations_that_do_not_exist_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        QuantScheme(**fields)  # type: ignore[arg-type]


@given(schemes())
def test_code_ranges(scheme: QuantScheme) -> None:
    assert scheme.code_max - scheme.code_min + 1 == 2**scheme.bits
    limits = torch.iinfo(scheme.code_dtype)
    assert limits.min <= scheme.code_min and scheme.code_max <= limits.max
    assert scheme.code_min == (-(2 ** (scheme.bits - 1)) if scheme.code == "int" else 0)


@given(schemes())
def test_schemes_are_frozen_values(scheme: QuantScheme) -> None:
    assert replace(scheme) == scheme and hash(replace(scheme)) == hash(scheme)
    with pytest.raises(FrozenInstanceError):
        scheme.bits = 4  # type: ignore[misc]


@pytest.mark.parametrize("weight", [parse("nf4g32").weight, parse("fp8").weight, parse("w8-axis0").weight])
def test_int8_activations_need_integers_along_the_input(weight: QuantScheme) -> None:
    with pytest.raises(ArgumentError, match="8-bit activations cannot be combined"):
        LayerScheme(weight=weight, activation=DYNAMIC_INT8)


@pytest.mark.parametrize(
    "activation",
    [QuantScheme(bits=8, group=None), replace(DYNAMIC_INT8, bits=4), replace(DYNAMIC_FP8, group=32), "int8"],
)
def test_other_activations_are_refused(activation: QuantScheme) -> None:
    with pytest.raises(ArgumentError, match="scheme field activation"):
        LayerScheme(weight=QuantScheme(), activation=activation)


@pytest.mark.parametrize(("weight", "group"), [(128, 96), (96, 64), (32, 33), (7, 3)])
def test_groups_of_activations_and_weights_are_multiples_of_each_other(weight: int, group: int) -> None:
    activation = replace(DYNAMIC_INT8, group=group)
    with pytest.raises(ArgumentError, match=f"groups of {group} cannot be combined") as caught:
        LayerScheme(weight=QuantScheme(group=weight), activation=activation)
    assert caught.value.code == "BW202" and f"-a8g{weight}" in caught.value.suggestion
    for fitting in (None, weight, 2 * weight, 1):
        scheme = LayerScheme(weight=QuantScheme(group=weight), activation=replace(DYNAMIC_INT8, group=fitting))
        assert scheme.activation_group == fitting
    assert LayerScheme(weight=QuantScheme(group=None), activation=activation).activation_group == group


def test_groups_of_activations_need_consecutive_groups_of_weights() -> None:
    for name in ("w4g32", "w4g32-a8"):
        parse(name).check_order(reordered=True)
    parse("w4g32-a8g32").check_order(reordered=False)
    with pytest.raises(ArgumentError, match="reordered columns") as caught:
        parse("w4g32-a8g32").check_order(reordered=True)
    assert "static_groups" in caught.value.suggestion


def test_groups_that_do_not_divide_a_layer() -> None:
    for name, columns, told in (
        ("w4g32-a8g64", 128, "w4g32-a8g64"), ("w4g32-a8g64", 96, "w4g32-a8"), ("w4g64-a8g32", 96, "w4-a8g32"),
        ("w4g64-a8g32", 40, "w4-a8"), ("w8-a8g64", 96, "w8-a8"), ("w8", 7, "w8"), ("w4g32", 40, "w4"),
    ):  # fmt: skip
        scheme = parse(name)
        assert scheme.has_whole_groups((8, columns)) == (told == name)
        assert scheme.without_partial_groups((8, columns)) == parse(told)


def test_a_layer_scheme_needs_a_scheme() -> None:
    with pytest.raises(ArgumentError, match="scheme field weight is 'w4'"):
        LayerScheme(weight="w4")  # type: ignore[arg-type]
