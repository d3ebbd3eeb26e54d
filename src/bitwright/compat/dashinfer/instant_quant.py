"""Instant quantization: the document's configuration, and the scheme that it means.

Weights are asymmetric with a zero point that is not rounded: ``int8`` codes on [-128, 127], ``uint4`` on [0, 15], scale
``(max - min) / (largest code - least code)``, zero point ``least code - min / scale``. Activations, if they are
quantized, are symmetric int8, one scale for each token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

from bitwright.core.errors import ArgumentError
from bitwright.core.scheme import LayerScheme
from bitwright.core.scheme_names import parse

__all__ = ["InstantQuantConfig"]

METHOD = "instant_quant"
# (weight_format, compute_method) to the name of the scheme.
SCHEMES = {
    ("int8", "weight_only"): "A16W8",
    ("uint4", "weight_only"): "A16W4",
    ("int8", "activate_quant"): "A8W8",
}
FORMATS = ("int8", "uint4")
COMPUTE_METHODS = ("weight_only", "activate_quant")


@dataclass(frozen=True, slots=True, kw_only=True)
class InstantQuantConfig:
    """What the document gives as ``customized_quant_config``.

    Attributes:
        quant_method: "instant_quant".
        weight_format: "int8" or "uint4".
        compute_method: "weight_only" (the default), or "activate_quant" for 8-bit activations too.
        group_size: columns per scale; ``None`` or -1 for one scale per output channel.

    Raises:
        ArgumentError: BW201, naming the field, its value and what is accepted.

    Example:
        >>> InstantQuantConfig(weight_format="int8", group_size=128).scheme.name
        'w8g128-asym-signed-fz-sf32'
    """

    quant_method: Literal["instant_quant"] = "instant_quant"
    weight_format: Literal["int8", "uint4"]
    compute_method: Literal["weight_only", "activate_quant"] = "weight_only"
    group_size: int | None = None

    def __post_init__(self) -> None:
        _check("quant_method", self.quant_method, self.quant_method == METHOD, METHOD)
        _check("weight_format", self.weight_format, self.weight_format in FORMATS, " or ".join(FORMATS))
        methods = " or ".join(COMPUTE_METHODS)
        _check("compute_method", self.compute_method, self.compute_method in COMPUTE_METHODS, methods)
        size = self.group_size
        is_size = size is None or (type(size) is int and (size == -1 or size > 0))
        _check("group_size", size, is_size, "a positive whole number; -1 or nothing for one scale per channel")
        if self.compute_method == "activate_quant" and self.weight_format == "uint4":
            raise ArgumentError(
                "BW201",
                "compute_method 'activate_quant' does not go with weight_format 'uint4'",
                suggestion="weight_format 'int8', or compute_method 'weight_only'",
            )
        if self.compute_method == "activate_quant" and size not in (None, -1):
            raise ArgumentError(
                "BW201",
                f"compute_method 'activate_quant' does not go with group_size {size}",
                why="activation quantization has one scale per channel",
                suggestion="leave group_size out, or compute_method 'weight_only'",
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> InstantQuantConfig:
        """Read the document's dictionary.

        Raises:
            ArgumentError: BW201 for a field that is missing, unknown, or has a value that is not accepted.
        """
        if not isinstance(config, Mapping):
            what = f"customized_quant_config is a {type(config).__name__}"
            raise ArgumentError("BW201", what, suggestion="a dictionary with quant_method and weight_format")
        _check("quant_method", config.get("quant_method"), config.get("quant_method") == METHOD, METHOD)
        if "weight_format" not in config:
            what = "customized_quant_config has no weight_format"
            raise ArgumentError("BW201", what, suggestion="weight_format: " + " or ".join(FORMATS))
        known = [field.name for field in fields(cls)]
        unknown = [str(key) for key in config if key not in known]
        if unknown:
            what = f"customized_quant_config has no field {unknown[0]!r}"
            raise ArgumentError("BW201", what, suggestion="one of " + ", ".join(known))
        return cls(**config)

    @property
    def scheme(self) -> LayerScheme:
        """The scheme of the layers."""
        named = parse(SCHEMES[self.weight_format, self.compute_method])
        size = None if self.group_size == -1 else self.group_size
        return replace(named, weight=replace(named.weight, group=size))

    @property
    def mode(self) -> str:
        """As the document calls it: ``A16W8`` and the like."""
        return SCHEMES[self.weight_format, self.compute_method]


def _check(field: str, value: object, is_valid: bool, accepted: str) -> None:
    if not is_valid:
        raise ArgumentError("BW201", f"{field} is {value!r}", suggestion=f"accepted: {accepted}")
