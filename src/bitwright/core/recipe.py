"""How a model is made: algorithm, options, and which scheme each layer gets. Saved with the result as provenance."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.scheme import LayerScheme
from bitwright.core.scheme_names import parse

__all__ = ["FLOAT", "OUTPUT_HEADS", "Choice", "Override", "Recipe", "parse_option_texts", "parse_override"]

FLOAT = "float"  # the scheme name that leaves a layer as it is
OUTPUT_HEADS = ("lm_head", "output_layer", "embed_out")  # left alone unless an override names them


@dataclass(frozen=True, slots=True, kw_only=True)
class Override:
    """A rule for some layers: ``scheme`` is ``None`` to leave them in floating point.

    ``pattern`` is an exact layer name or a regular expression that must match the whole name; with ``is_type`` it is
    the class name of a layer (``Linear``, ``Conv1D``). ``algorithm`` is the recipe's own unless another one is given.
    ``options`` change the recipe's where the algorithm is the recipe's, and are all there is where it is another.
    """

    pattern: str
    scheme: LayerScheme | None
    is_type: bool = False
    algorithm: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except re.error as error:
            message = f"override {self.pattern!r} is not a regular expression: {error}"
            suggestion = (
                r"write .* for any text (.*\.down_proj), and a backslash before characters that stand for themselves"
            )
            raise ArgumentError("BW201", message, suggestion=suggestion) from None

    def matches(self, name: str, type_name: str) -> bool:
        subject = type_name if self.is_type else name
        return subject == self.pattern or re.fullmatch(self.pattern, subject) is not None


@dataclass(frozen=True, slots=True)
class Choice:
    """What becomes of one layer."""

    scheme: LayerScheme
    algorithm: str
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    r"""Everything that decides the result, and nothing that does not.

    Precedence for one layer: ``scheme`` < type overrides < name overrides; among equals the last match wins, and an
    override whose pattern is exactly the layer's name beats every expression. The output head stays in floating
    point unless a name override matches it.

    Example:
        >>> Recipe(scheme=parse("w4g128"), overrides=(parse_override(r".*[.]down_proj=w8"),))
    """

    scheme: LayerScheme
    algorithm: str = "rtn"
    options: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    seed: int = 0

    def scheme_for(self, name: str, type_name: str, *, is_head: bool | None = None) -> LayerScheme | None:
        """The scheme of the layer ``name``, as :meth:`choice_for` makes it out; ``None`` leaves it float."""
        choice = self.choice_for(name, type_name, is_head=is_head)
        return None if choice is None else choice.scheme

    def choice_for(self, name: str, type_name: str, *, is_head: bool | None = None) -> Choice | None:
        """What becomes of the layer ``name`` of class ``type_name``; ``None`` leaves it in floating point.

        ``is_head``: whether it is the output head, where the model says so; else that is judged by its name.
        """
        if is_head is None:
            is_head = name.rpartition(".")[2] in OUTPUT_HEADS
        matching = [override for override in self.overrides if override.matches(name, type_name)]
        if is_head and all(override.is_type for override in matching):
            return None
        if not matching:
            return Choice(self.scheme, self.algorithm, self.options)
        # Sorting is stable, so that among equal ranks the last given stays last.
        rank = lambda override: (not override.is_type, override.pattern == name)  # noqa: E731
        rule = sorted(matching, key=rank)[-1]
        if rule.scheme is None:
            return None
        return Choice(rule.scheme, rule.algorithm or self.algorithm, self.options_for(rule))

    def options_for(self, rule: Override) -> Mapping[str, Any]:
        """With what the algorithm of layers runs to which ``rule`` applies."""
        own = rule.algorithm in (None, self.algorithm)
        return {**self.options, **rule.options} if own else rule.options

    def check_overrides(
        self, layers: Iterable[tuple[str, str]], *, embeddings: Collection[tuple[str, str]] = ()
    ) -> None:
        """Raise if an override matches none of ``layers`` (pairs of name and class name), as ``embeddings`` are.

        Raises:
            BitwrightError: BW208, naming the override and the nearest layers.
        """
        known = list(layers)
        for override in self.overrides:
            if any(override.matches(name, type_name) for name, type_name in known):
                continue
            names = sorted({type_name for _, type_name in known} if override.is_type else {name for name, _ in known})
            never = next((name for name, type_name in embeddings if override.matches(name, type_name)), None)
            near = difflib.get_close_matches(override.pattern, names, n=3, cutoff=0.0)
            raise BitwrightError(
                "BW208",
                f"override {override.pattern!r} matches no {'layer type' if override.is_type else 'layer'}",
                why="patterns are regular expressions that must match the whole name"
                if never is None
                else f"{never} is an embedding, and embeddings are never quantized",
                suggestion="nearest: " + ", ".join(near),
            )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready record; equal recipes give equal records."""
        overrides = [
            {
                "pattern": override.pattern,
                "type": override.is_type,
                "scheme": override.scheme.name if override.scheme else FLOAT,
                **({"algorithm": override.algorithm} if override.algorithm else {}),
                **({"options": dict(override.options)} if override.algorithm or override.options else {}),
            }
            for override in self.overrides
        ]
        return {
            "algorithm": self.algorithm,
            "options": dict(self.options),
            "scheme": self.scheme.name,
            "overrides": overrides,
            "seed": self.seed,
        }


# The last "=" with a scheme after it ends the pattern: no "=", no "@", and whole parentheses.
OVERRIDE = re.compile(
    r"(?P<pattern>.+)=(?P<scheme>[^=@()]*(?:\([^=@()]*\)[^=@()]*)*)(?:@(?P<algorithm>[^=@()]+)(?:\((?P<options>.*)\))?)?",
    re.DOTALL,
)
OVERRIDE_FORMS = "NAME=SCHEME, NAME=SCHEME@ALGORITHM or NAME=SCHEME@ALGORITHM(OPTION=VALUE,...)"


def parse_override(text: str) -> Override:
    """Read ``NAME=SCHEME``, ``PATTERN=float``, ``type:CLASS=SCHEME`` or ``NAME=SCHEME@ALGORITHM(OPTION=VALUE,...)``.

    Values are those of :func:`parse_option_texts`; spaces around names and values do not count.

    Raises:
        ArgumentError: BW201 for text of another form, BW202 for an unknown scheme.
    """
    found = OVERRIDE.fullmatch(text.strip())
    # Where options are cut short their last value looks like a scheme; what stands before it shows what was meant.
    if found is None or re.search(r"=[^=@()]+(\([^()]*\))?@[^=@()]+[(=]", found["pattern"] + "="):
        example = r"for example 'model\.layers\.0\..*=w8', lm_head=w8 or '.*q_proj=w4g32@gptq(damp=0.05)'"
        raise ArgumentError("BW201", f"cannot read override {text!r}", suggestion=f"{OVERRIDE_FORMS}, {example}")
    pattern, scheme, algorithm, options = found.groups()
    layer_scheme = None if scheme.strip().lower() == FLOAT else parse(scheme)
    if algorithm and layer_scheme is None:
        message = f"override {text!r} leaves layers in floating point, where {algorithm} has nothing to do"
        raise ArgumentError("BW201", message, suggestion=OVERRIDE_FORMS)
    # A comma ends an option where the name of another one follows: values may have commas of their own.
    options_given = re.split(r",(?=\s*[\w.]+\s*=)", options) if options and options.strip() else []
    try:
        values = parse_option_texts(options_given)
    except ArgumentError as error:
        what = f"override {text!r}: {error.what}"
        raise ArgumentError(error.code, what, suggestion=error.suggestion) from None
    return Override(
        pattern=pattern.removeprefix("type:"),
        scheme=layer_scheme,
        is_type=pattern.startswith("type:"),
        algorithm=None if algorithm is None else algorithm.strip(),
        options=values,
    )


def parse_option_texts(texts: Sequence[str]) -> dict[str, Any]:
    """``NAME=VALUE`` pairs; a value is JSON (a number, ``true``, ``false``, ``null``, ...), or else text.

    Raises:
        ArgumentError: BW201 for text without ``=``, or a name that is given twice.
    """
    options: dict[str, Any] = {}
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not name or name in options:
            message = f"option {name} is given twice" if name in options else f"cannot read option {text!r}"
            raise ArgumentError("BW201", message, suggestion="NAME=VALUE, for example search=true")
        try:
            options[name] = json.loads(value)
        except (ValueError, RecursionError):
            options[name] = value
    return options
