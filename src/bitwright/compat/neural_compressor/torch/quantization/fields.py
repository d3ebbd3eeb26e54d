"""Fields of configurations that are checked when they are set: at construction, and whenever they are assigned."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from bitwright.core.errors import ArgumentError

__all__ = [
    "Accepted",
    "CheckedFields",
    "accept_aliases",
    "flag",
    "fraction",
    "one_of",
    "optional",
    "path",
    "setting",
    "whole",
]

CHECK = "accepted"  # where a dataclass field keeps what it accepts
Configuration = TypeVar("Configuration", bound=type)


@dataclass(frozen=True, slots=True)
class Accepted:
    """What a field takes: a test, and the words for it in messages."""

    test: Callable[[Any], bool]
    words: str


def whole(low: int, high: int | None = None, *also: int) -> Accepted:
    """Whole numbers from ``low`` to ``high``, and some others."""
    span = f"{low} to {high}" if high is not None else f"{low} or more"
    words = "a whole number: " + " or ".join([*map(str, also), span])
    return Accepted(lambda value: type(value) is int and (value in also or low <= value <= (high or value)), words)


def fraction(low: float, high: float = float("inf")) -> Accepted:
    """Numbers from ``low`` to ``high``."""
    words = f"a number from {low:g}" + ("" if high == float("inf") else f" to {high:g}")
    return Accepted(lambda value: type(value) in (int, float) and low <= value <= high, words)


def flag() -> Accepted:
    return Accepted(lambda value: type(value) is bool, "True or False")


def one_of(*values: object) -> Accepted:
    words = ", ".join(map(repr, values))
    return Accepted(lambda value: any(type(value) is type(each) and value == each for each in values), words)


def path() -> Accepted:
    return Accepted(lambda value: isinstance(value, str), "a path, as a string")


def optional(accepted: Accepted) -> Accepted:
    return Accepted(lambda value: value is None or accepted.test(value), f"{accepted.words}; or None")


def setting(default: Any, accepted: Accepted) -> Any:
    """A dataclass field with a default, and what it accepts."""
    return dataclasses.field(default=default, metadata={CHECK: accepted})


class CheckedFields:
    """A dataclass whose fields refuse what they do not accept, also when they are assigned later.

    Raises:
        ArgumentError: BW201 (a ``ValueError``), naming the field, its value and what is accepted.
        AttributeError: when something is assigned that is no field.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(getattr(type(self), name, None), property):
            object.__setattr__(self, name, value)
            return
        field = type(self).__dataclass_fields__.get(name)
        if field is None and not name.startswith("_"):
            known = ", ".join(each.name for each in dataclasses.fields(self))
            raise AttributeError(f"{type(self).__name__} has no field {name!r}; its fields: {known}")
        accepted = field.metadata.get(CHECK) if field is not None else None
        if accepted is not None and not accepted.test(value):
            raise ArgumentError(
                "BW201", f"{type(self).__name__}: {name} is {value!r}", suggestion=f"accepted: {accepted.words}"
            )
        missing = object()
        before = self.__dict__.get(name, missing)
        object.__setattr__(self, name, value)
        if "_built" in self.__dict__ and field is not None:
            try:
                self.check()
            except ArgumentError:
                object.__setattr__(self, name, before)
                raise

    def __post_init__(self) -> None:
        self.check()
        object.__setattr__(self, "_built", True)

    def check(self) -> None:
        """Refuse fields that do not go together."""

    def refuse(self, name: str, why: str, accepted: str) -> None:
        """Raise for the field ``name``, which is right in itself but not beside others."""
        value = getattr(self, name)
        what = f"{type(self).__name__}: {name} is {value!r}, {why}"
        raise ArgumentError("BW201", what, suggestion=f"accepted: {accepted}")


def accept_aliases(**names: str) -> Callable[[Configuration], Configuration]:
    """Let a dataclass take each alias for the field that it names: when it is built, read or assigned.

    Raises:
        TypeError: when it is built with both.
    """

    def decorate(kind: Configuration) -> Configuration:
        build = vars(kind)["__init__"]

        @functools.wraps(build)
        def renamed(self: Any, **values: Any) -> None:
            for alias, name in names.items():
                if alias in values and name in values:
                    raise TypeError(f"{kind.__name__}: {alias} is another name of {name}; give one of them")
                if alias in values:
                    values[name] = values.pop(alias)
            build(self, **values)

        setattr(kind, "__init__", renamed)  # noqa: B010
        for alias, name in names.items():
            setattr(kind, alias, _alias_of(name))
        return kind

    return decorate


def _alias_of(name: str) -> property:
    return property(lambda self: getattr(self, name), lambda self, value: setattr(self, name, value))
