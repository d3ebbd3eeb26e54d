"""How one request is to be answered, validated when it is made."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from bitwright.core.errors import ArgumentError

__all__ = ["RequestOptions", "check_count", "check_number", "is_finite", "show"]

MOST_LOGPROBS = 20
MOST_STOPS = 64
MOST_TOKENS = 1 << 31  # more than any context holds
MOST_SHOWN = 200  # characters of a wrong value that an error shows


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOptions:
    """What is to be generated.

    Attributes:
        max_tokens: how many tokens at most; ``None`` for 128 or what is left of the context.
        temperature: 0 for the likeliest token, else the divisor of the logits before sampling.
        top_k: sample among so many of the likeliest tokens; 0 for all.
        top_p: sample among the fewest tokens that have this probability together (Holtzman et al. 2020).
        min_p: leave out tokens less likely than this share of the likeliest (Nguyen et al. 2024).
        repetition_penalty: logits of tokens in the prompt or the answer are divided by it if positive, else multiplied
            (Keskar et al. 2019).
        presence_penalty: taken from the logits of tokens in the answer.
        frequency_penalty: as often as the token is in the answer.
        logit_bias: added to the logits of single tokens.
        stop: texts before which the answer ends.
        stop_ids: tokens that end the answer, beside those with which the model ends a text.
        ignore_end: go on when the model ends its text.
        seed: equal seeds give equal answers; ``None`` for one by chance, which the answer tells.
        logprobs: for each token its log-probability and those of so many likeliest ones; ``None`` for none.

    Raises:
        ArgumentError: BW201, naming the field and what it may be.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    stop: str | Sequence[str] = ()
    stop_ids: Sequence[int] = ()
    ignore_end: bool = False
    seed: int | None = None
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_count("max_tokens", self.max_tokens, 1, MOST_TOKENS)
        check_number("temperature", self.temperature, lambda x: x >= 0, "a finite number, 0 or more")
        check_count("top_k", self.top_k, 0)
        check_number("top_p", self.top_p, lambda x: 0 < x <= 1, "above 0 and at most 1")
        check_number("min_p", self.min_p, lambda x: 0 <= x <= 1, "from 0 to 1")
        check_number("repetition_penalty", self.repetition_penalty, lambda x: x > 0, "a finite number above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            check_number(name, getattr(self, name), lambda x: -2 <= x <= 2, "from -2 to 2")
        if self.seed is not None:
            check_count("seed", self.seed, 0, (1 << 63) - 1)
        if self.logprobs is not None:
            check_count("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        if type(self.ignore_end) is not bool:
            raise ArgumentError("BW201", f"ignore_end is {self.ignore_end!r}", suggestion="True or False")
        self._check_stops()
        self._check_bias()

    def _check_stops(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, kind in (("stop", str), ("stop_ids", int)):
            values = getattr(self, name)
            is_list = isinstance(values, tuple | list) and len(values) <= MOST_STOPS
            if not is_list or not all(type(value) is kind and value not in ("", None) for value in values):
                accepted = "texts that are not empty" if kind is str else "tokens"
                what = f"{name} is {show(values)}"
                raise ArgumentError("BW201", what, suggestion=f"accepted: at most {MOST_STOPS} {accepted}")
            object.__setattr__(self, name, tuple(values))

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping):
            what = f"logit_bias is {show(self.logit_bias)}"
            raise ArgumentError("BW201", what, suggestion="accepted: {token: number}")
        for token, bias in self.logit_bias.items():
            check_count("a token of logit_bias", token, 0)
            # Minus infinity forbids a token; plus infinity, or NaN, leaves no probabilities.
            if bias != -math.inf:
                check_number(f"logit_bias[{show(token)}]", bias, lambda x: abs(x) <= 1e6, "a number, or minus infinity")
        object.__setattr__(self, "logit_bias", dict(self.logit_bias))


def check_count(name: str, value: object, least: int, most: int | None = None) -> int:
    """``value`` as a whole number from ``least`` to ``most``.

    Raises:
        ArgumentError: BW201 if it is none.
    """
    if type(value) is int and value >= least and (most is None or value <= most):
        return value
    accepted = f"a whole number, at least {least}" if most is None else f"a whole number from {least} to {most}"
    raise ArgumentError("BW201", f"{name} is {show(value)}", suggestion=f"accepted: {accepted}")


def check_number(name: str, value: object, accepts: Callable[[float], bool], accepted: str) -> None:
    """Refuse what is not a finite number that ``accepts`` accepts.

    Raises:
        ArgumentError: BW201, with ``accepted``.
    """
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and is_finite(value)
    if not is_number or not accepts(float(value)):  # type: ignore[arg-type]
        raise ArgumentError("BW201", f"{name} is {show(value)}", suggestion=f"accepted: {accepted}")


def is_finite(value: float) -> bool:
    """Whether ``value`` is finite, and as a float still is."""
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float can be
        return False


def show(value: object) -> str:
    """``value`` as an error shows it."""
    try:
        return repr(value)[:MOST_SHOWN]
    except ValueError:  # Python does not write whole numbers of thousands of digits
        return "a number of thousands of digits"
