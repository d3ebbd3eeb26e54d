"""The table of algorithms. A new one is a file, a row here and a test."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bitwright.core.errors import BitwrightError
from bitwright.core.recipe import Recipe
from bitwright.core.scheme import LayerScheme
from bitwright.quantization.autoround import AUTOROUND
from bitwright.quantization.awq import AWQ, AWQ_ROUND, AWQ_SCALE
from bitwright.quantization.choice import CHOICE
from bitwright.quantization.gptq import GPTQ
from bitwright.quantization.hqq import HQQ
from bitwright.quantization.learned import LEARNED
from bitwright.quantization.logits import LOGITS
from bitwright.quantization.rotated import ROTATION
from bitwright.quantization.rtn import RTN
from bitwright.quantization.stages import Algorithm
from bitwright.quantization.teq import TEQ

__all__ = ["ALGORITHMS", "Method", "check_options", "get_algorithm", "make_method", "parse_options", "refuse_schemes"]

ALGORITHMS: dict[str, Algorithm] = {
    "rtn": Algorithm(round=RTN),
    "hqq": Algorithm(round=HQQ),
    "gptq": Algorithm(round=GPTQ, calibrated=True, with_gram=True),
    "gptq+learned": Algorithm(round=GPTQ, tune=(LEARNED,), calibrated=True, with_gram=True, with_float_flow=True),
    "autoround": Algorithm(round=RTN, tune=(AUTOROUND,), calibrated=True, with_float_flow=True),
    "autoround+logits": Algorithm(round=RTN, tune=(AUTOROUND,), finish=LOGITS, calibrated=True, with_float_flow=True),
    "gptq+logits": Algorithm(round=GPTQ, finish=LOGITS, calibrated=True, with_gram=True),
    "best": Algorithm(
        round=CHOICE, tune=(LEARNED,), finish=LOGITS, calibrated=True, with_gram=True, with_float_flow=True
    ),
    "choice": Algorithm(round=CHOICE, calibrated=True, with_gram=True),
    "awq": Algorithm(equalize=(AWQ,), round=AWQ_ROUND, calibrated=True),
    "teq": Algorithm(equalize=(TEQ,), round=RTN, calibrated=True),
    "awq+gptq": Algorithm(equalize=(AWQ_SCALE,), round=GPTQ, calibrated=True, with_gram=True),
    "rotation+gptq": Algorithm(rotate=ROTATION, round=GPTQ, calibrated=True, with_gram=True),
    "teq+gptq": Algorithm(equalize=(TEQ,), round=GPTQ, calibrated=True, with_gram=True),
}


@dataclass(frozen=True, slots=True)
class Method:
    """An algorithm by name, with the options record of each of its stages."""

    name: str
    algorithm: Algorithm
    options: Mapping[str, Any]


def get_algorithm(name: str) -> Algorithm:
    """Look an algorithm up.

    Raises:
        BitwrightError: BW201 listing the known names.
    """
    if name not in ALGORITHMS:
        raise BitwrightError("BW201", f"unknown algorithm {name!r}", suggestion="one of " + ", ".join(ALGORITHMS))
    return ALGORITHMS[name]


def make_method(name: str, values: Mapping[str, Any]) -> Method:
    """The algorithm ``name`` with options ``values``.

    Raises:
        BitwrightError: as :func:`parse_options`.
    """
    return Method(name, get_algorithm(name), parse_options(name, values))


def refuse_schemes(methods: Mapping[str, Method], schemes: Mapping[str, LayerScheme]) -> None:
    """Ask every stage of every layer's algorithm whether it can make what the layer is to store.

    Raises:
        BitwrightError: BW201 naming the first layer for which one cannot.
    """
    for name, method in methods.items():
        for stage in method.algorithm.stages:
            scheme = schemes[name].weight
            reason = stage.refuse(scheme, method.options[stage.name])
            if reason is not None:
                what = f"{stage.name} cannot use {scheme.name}, the scheme of {name}: {reason}"
                raise BitwrightError("BW201", what, suggestion="another scheme, or another algorithm for such layers")


def parse_options(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """The options record of each stage of algorithm ``name``, by the stage's name.

    ``values`` are given by field (``act_order``), or by stage and field (``gptq.damp``) where several stages of a
    composition have a field of that name.

    Raises:
        BitwrightError: BW201 naming the option that is unknown or could be several, or whose value is of a wrong type
            or out of range.
    """
    stages = {stage.name: stage for stage in get_algorithm(name).stages}
    given: dict[str, dict[str, Any]] = {stage: {} for stage in stages}
    for option, value in values.items():
        owner, field = _find_option(name, option)
        given[owner][field] = _checked(f"{name} option {option}", value, stages[owner].options, field)
    return {stage: stages[stage].options(**values) for stage, values in given.items()}


def _find_option(name: str, option: str) -> tuple[str, str]:
    """The stage of algorithm ``name`` that has ``option``, and the field's own name."""
    fields = {
        stage.name: [field.name for field in dataclasses.fields(stage.options)] for stage in get_algorithm(name).stages
    }
    stage, dot, field = option.rpartition(".")
    owners = [owner for owner in fields if field in fields[owner] and (stage == owner or not dot)]
    if len(owners) != 1:
        known = [f"{owner}.{each}" if len(fields) > 1 else each for owner in fields for each in sorted(fields[owner])]
        choices = [f"{owner}.{field}" for owner in owners] or known
        what = f"{name} has several options {option!r}" if owners else f"{name} has no option {option!r}"
        raise BitwrightError("BW201", what, suggestion=f"its options: {', '.join(choices)}")
    return owners[0], field


def check_options(recipe: Recipe) -> None:
    """Read the options of a recipe and of each of its overrides, whether or not those apply to a layer.

    Raises:
        BitwrightError: as :func:`parse_options`, naming the override; BW201 for an option given by both its names.
    """
    parse_options(recipe.algorithm, recipe.options)
    _refuse_twice(recipe.algorithm, recipe.options)
    for rule in recipe.overrides:
        algorithm = rule.algorithm or recipe.algorithm
        try:
            parse_options(algorithm, recipe.options_for(rule))
            _refuse_twice(algorithm, rule.options)
        except BitwrightError as error:
            what = f"override {rule.pattern!r}: {error.what}"
            raise BitwrightError(error.code, what, why=error.why, suggestion=error.suggestion) from None


def _refuse_twice(name: str, values: Mapping[str, Any]) -> None:
    first: dict[tuple[str, str], str] = {}
    for option in values:
        before = first.setdefault(_find_option(name, option), option)
        if before != option:
            raise BitwrightError(
                "BW201", f"{name}: {before} and {option} are the same option", suggestion="one of them"
            )


def _checked(what: str, value: Any, options: type, field: str) -> Any:
    """``value`` if it is of the type that the field declares; whole numbers pass for fractions."""
    hint = typing.get_type_hints(options)[field]
    accepted = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    plain = [kind for kind in accepted if kind in (bool, int, float, str, types.NoneType)]
    if len(plain) < len(accepted):
        return value  # a choice or a structure: the record itself checks it
    if type(value) is int and float in plain and int not in plain:
        return float(value)
    if type(value) not in plain:
        kinds = " or ".join("null" if kind is types.NoneType else kind.__name__ for kind in plain)
        raise BitwrightError("BW201", f"{what} is {value!r}", suggestion=f"a {kinds}")
    return value
