"""What numbers are stored: the validated records that everything else is typed by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from bitwright.core.errors import ArgumentError

__all__ = ["CODEBOOK_BITS", "DYNAMIC_FP8", "DYNAMIC_INT8", "Code", "LayerScheme", "QuantScheme"]

Code = Literal["int", "uint", "nf4", "fp4_e2m1", "fp4_bnb", "fp8_e4m3"]

# Code kinds whose values are looked up rather than counted, and the only width each exists in.
CODEBOOK_BITS: dict[str, int] = {"nf4": 4, "fp4_e2m1": 4, "fp4_bnb": 4, "fp8_e4m3": 8}
CODES = ("int", "uint", *CODEBOOK_BITS)
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """How one tensor of numbers is stored.

    Attributes:
        code: ``int`` (two's complement, ``[-2^(b-1), 2^(b-1)-1]``), ``uint`` (``[0, 2^b-1]``), or a table of levels.
        bits: 1 to 8; 4 for the four-bit tables, 8 for fp8.
        group: how many consecutive numbers share a scale; ``None``: the whole row (one scale per output channel).
        axis: 1: groups run along the input features of a row; 0: along the output features of a column.
        symmetric: zero is code 0 and no zero point is stored.
        zero: asymmetric only: the zero point is a rounded ``integer`` code, or a ``float`` (instant quantization, HQQ).
        scale_dtype: dtype in which scales (and float zeros) are stored.
        scale_scheme: double quantization: the scales themselves, flattened row by row, are stored in this scheme.

    Raises:
        ArgumentError: BW202, naming the field, its value and what is accepted.

    Example:
        >>> QuantScheme(bits=4, group=128).name
        'w4g128'
    """

    code: Code = "int"
    bits: int = 4
    group: int | None = 128
    axis: Literal[0, 1] = 1
    symmetric: bool = True
    zero: Literal["integer", "float"] = "integer"
    scale_dtype: torch.dtype = torch.float16
    scale_scheme: QuantScheme | None = None

    def __post_init__(self) -> None:
        _check("code", self.code, self.code in CODES, ", ".join(CODES))
        _check("bits", self.bits, type(self.bits) is int and 1 <= self.bits <= 8, "1 to 8")
        group_is_valid = self.group is None or (type(self.group) is int and self.group >= 1)
        _check("group", self.group, group_is_valid, "a positive whole number, or None for one scale per channel")
        _check("axis", self.axis, self.axis in (0, 1), "1 (along the input features) or 0")
        _check("symmetric", self.symmetric, type(self.symmetric) is bool, "True or False")
        _check("zero", self.zero, self.zero in ("integer", "float"), "integer or float")
        _check("scale_dtype", self.scale_dtype, self.scale_dtype in SCALE_DTYPES, ", ".join(map(str, SCALE_DTYPES)))
        _check_combination(self)

    @property
    def is_codebook(self) -> bool:
        return self.code in CODEBOOK_BITS

    @property
    def code_min(self) -> int:
        """The smallest code: ``-2^(b-1)`` for ``int``, else 0."""
        return -(1 << (self.bits - 1)) if self.code == "int" else 0

    @property
    def code_max(self) -> int:
        return self.code_min + (1 << self.bits) - 1

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8 if self.code == "int" else torch.uint8

    @property
    def name(self) -> str:
        """The short name that :func:`bitwright.core.scheme_names.parse` reads back to an equal scheme."""
        parts = [f"w{self.bits}" if not self.is_codebook else self.code.replace("_", "")]
        parts[0] += f"g{self.group}" if self.group is not None else ""
        if not self.symmetric:
            parts.append("asym")
            parts += ["signed"] if self.code == "int" else []
            parts += ["fz"] if self.zero == "float" else []
        parts += ["axis0"] if self.axis == 0 else []
        parts += [] if self.scale_dtype == torch.float16 else [DTYPE_TAGS[self.scale_dtype]]
        name = "-".join(parts)
        return name if self.scale_scheme is None else f"{name}-dq({self.scale_scheme.name})"


DTYPE_TAGS = {torch.bfloat16: "sbf16", torch.float32: "sf32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerScheme:
    """How a linear layer is stored and computed: its weight, and its activations if they are quantized too.

    ``activation`` is applied while running, and measured on the token itself: one scale per token (``group=None``), or,
    of int8, one for each ``group`` consecutive input features of a token; the last group may be shorter. Sums run over
    what shares both scales, so that one of this group and the weight's must be a multiple of the other.
    """

    weight: QuantScheme
    activation: QuantScheme | None = None

    def __post_init__(self) -> None:
        _check("weight", self.weight, isinstance(self.weight, QuantScheme), "a QuantScheme")
        if self.activation is None:
            return
        if self.activation == DYNAMIC_FP8:
            _check_fp8_product(self.weight)
            return
        is_scheme = isinstance(self.activation, QuantScheme)
        known = is_scheme and replace(self.activation, group=None) == DYNAMIC_INT8
        _check("activation", self.activation, known, "DYNAMIC_INT8, that with a group, DYNAMIC_FP8, or None")
        _check_int8_product(self.weight, self.activation.group)

    @property
    def name(self) -> str:
        if self.activation is None:
            return self.weight.name
        if self.activation == DYNAMIC_FP8:
            return f"{self.weight.name}-afp8"
        return f"{self.weight.name}-a8" + ("" if self.activation.group is None else f"g{self.activation.group}")

    @property
    def activation_group(self) -> int | None:
        """How many consecutive input features of a token share a scale; ``None``: all, or activations are exact."""
        return None if self.activation is None else self.activation.group

    def has_whole_groups(self, shape: tuple[int, int]) -> bool:
        """Whether all groups of a layer ``[out, in]``, of the weight and of the activations, have one size."""
        parts = [self.weight] if self.activation is None else [self.weight, self.activation]
        return all(part.group is None or shape[part.axis] % part.group == 0 for part in parts)

    def without_partial_groups(self, shape: tuple[int, int]) -> LayerScheme:
        """One scale per channel, or per token, where groups do not divide a layer ``[out, in]``."""
        weight, activation = self.weight, self.activation
        if weight.group is not None and shape[weight.axis] % weight.group:
            weight = replace(weight, group=None)
        if activation is not None and activation.group is not None and shape[1] % activation.group:
            activation = DYNAMIC_INT8
        return LayerScheme(weight=weight, activation=activation)

    def check_order(self, *, reordered: bool) -> None:
        """Refuse groups of activations beside groups of weights that are not runs of consecutive columns.

        Raises:
            ArgumentError: BW202, with what to change.
        """
        if reordered and self.activation_group is not None:
            raise ArgumentError(
                "BW202",
                f"activations in groups of {self.activation_group} cannot be combined with reordered columns",
                why="columns that share a scale of the weight would then lie in several groups of a token",
                suggestion="keep the weight's groups consecutive (GPTQ: static_groups=true, group_aware=true or "
                "act_order=false), or take one scale a token: -a8",
            )


def _check(field: str, value: object, is_valid: bool, accepted: str) -> None:
    if not is_valid:
        raise ArgumentError("BW202", f"scheme field {field} is {value!r}", suggestion=f"accepted: {accepted}")


def _check_combination(scheme: QuantScheme) -> None:
    if scheme.is_codebook:
        bits = CODEBOOK_BITS[scheme.code]
        _check("bits", scheme.bits, scheme.bits == bits, f"{bits} for {scheme.code}")
        _check("symmetric", scheme.symmetric, scheme.symmetric, f"True for {scheme.code}")
    if scheme.code == "uint":
        _check("symmetric", scheme.symmetric, not scheme.symmetric, "False for uint (it needs a zero point)")
    if scheme.symmetric:
        _check("zero", scheme.zero, scheme.zero == "integer", "integer for symmetric schemes (no zero point is stored)")
    if scheme.scale_scheme is not None:
        nested = scheme.scale_scheme
        _check("scale_scheme", nested, isinstance(nested, QuantScheme), "a QuantScheme, or None")
        _check("scale_scheme", nested.name, nested.scale_scheme is None, "one level of double quantization")
        _check("scale_scheme", nested.name, nested.axis == 1 and not nested.is_codebook, "integers along axis 1")


def _check_int8_product(weight: QuantScheme, group: int | None) -> None:
    """Whole numbers whose sums run over what shares the weight's scale and the token's."""
    if weight.is_codebook:
        raise ArgumentError(
            "BW202",
            f"8-bit activations cannot be combined with {weight.code} weights",
            why="the product of two integers is what makes 8-bit activations worth having",
            suggestion="w8a8 or w4a8",
        )
    if weight.axis != 1:
        raise ArgumentError(
            "BW202",
            "8-bit activations cannot be combined with weight groups along axis 0",
            why="an integer sum runs along the input features, so its scale must be constant there",
            suggestion="groups along axis 1, or none: w8a8, w4g32-a8",
        )
    if group is None or weight.group is None or not (group % weight.group and weight.group % group):
        return
    raise ArgumentError(
        "BW202",
        f"activations in groups of {group} cannot be combined with weights in groups of {weight.group}",
        why="a sum has one scale of the weight and one of the token: one group must be a multiple of the other",
        suggestion=f"-a8g{weight.group}, or -a8 for one scale a token",
    )


def _check_fp8_product(weight: QuantScheme) -> None:
    """Matrix units multiply e4m3 by e4m3: weights are such numbers with a scale a row, or small whole ones."""
    is_whole = weight.bits == 4 and not weight.is_codebook and weight.zero == "integer" and weight.axis == 1
    if not is_whole and not (weight.code == "fp8_e4m3" and weight.group is None and weight.axis == 1):
        raise ArgumentError(
            "BW202",
            f"fp8 activations cannot be combined with {weight.name} weights",
            why="both sides of the product must be e4m3 numbers, exactly",
            suggestion="fp8-afp8, w4g128-afp8 or w4g128-asym-afp8",
        )


# The ways to quantize activations: a scale per token, symmetric, as integer products and those of fp8 units need. Those
# to int8 may also have a group: a scale for each so many input features of a token.
DYNAMIC_INT8 = QuantScheme(code="int", bits=8, group=None, scale_dtype=torch.float32)
DYNAMIC_FP8 = QuantScheme(code="fp8_e4m3", bits=8, group=None, scale_dtype=torch.float32)
