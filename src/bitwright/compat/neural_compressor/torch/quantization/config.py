"""What the configurations of all algorithms share: common fields, rules for some layers, dictionaries and JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from bitwright.compat.neural_compressor.torch.quantization.fields import CheckedFields, flag, one_of, setting, whole
from bitwright.core.errors import ArgumentError
from bitwright.formats.storage import write_file

__all__ = ["DTYPES", "FLOAT", "GLOBAL", "LOCAL", "LocalRule", "WeightOnlyConfig"]

GLOBAL, LOCAL = "global", "local"
FLOAT = "fp32"  # the dtype that leaves a layer as it is
# The document's dtypes, and the codes that they store; fp4 is the four-bit float of bitsandbytes.
DTYPES = {"int": "int", "nf4": "nf4", "fp4": "fp4_bnb", "fp4_e2m1_bnb": "fp4_bnb", "fp4_e2m1": "fp4_e2m1"}
Operator = str | type[nn.Module] | list[str | type[nn.Module]] | tuple[str | type[nn.Module], ...]


@dataclass(frozen=True, slots=True)
class LocalRule:
    """A configuration for some layers: by name (exact, or a regular expression for the whole name) or by class."""

    pattern: str
    is_type: bool
    config: WeightOnlyConfig

    @property
    def key(self) -> str:
        """What stands for it in a dictionary."""
        return self.pattern


@dataclass(kw_only=True, eq=False)
class WeightOnlyConfig(CheckedFields):
    """The arguments that every algorithm has.

    Attributes:
        dtype: ``int``; ``nf4``, ``fp4`` (that is ``fp4_e2m1_bnb``) or ``fp4_e2m1``; ``fp32`` leaves layers as they are.
        bits: 1 to 8; 4 for the dtypes that are tables.
        group_size: input features that share a scale; -1: one scale per output channel.
        use_sym: symmetric around zero, without zero points.
        quant_lm_head: quantize the last layer too (the model's output head; ``lm_head``, ``output_layer``,
            ``embed_out``).
        use_double_quant: quantize the scales in their turn, as the ``double_quant_`` fields say.

    Raises:
        ValueError: naming the field, its value and what is accepted.
        TypeError: for an argument that does not exist.
    """

    algorithm: ClassVar[str]

    dtype: str = setting("int", one_of(*DTYPES, FLOAT))
    bits: int = setting(4, whole(1, 8))
    group_size: int = setting(32, whole(1, None, -1))
    use_sym: bool = setting(True, flag())
    quant_lm_head: bool = setting(False, flag())
    use_double_quant: bool = setting(False, flag())
    double_quant_dtype: str = setting("int", one_of("int"))
    double_quant_bits: int = setting(8, whole(1, 8))
    double_quant_use_sym: bool = setting(False, flag())
    double_quant_group_size: int = setting(256, whole(1, None, -1))

    def __post_init__(self) -> None:
        self._local: dict[tuple[str, bool], WeightOnlyConfig] = {}
        super().__post_init__()

    def check(self) -> None:
        """Refuse fields that do not go together.

        Raises:
            ArgumentError: naming one of the fields.
        """
        if self.dtype in (FLOAT, "int"):
            return
        if self.bits != 4:
            self.refuse("bits", f"but {self.dtype} is a table of 16 levels", "4")
        if not self.use_sym:
            self.refuse("use_sym", f"but {self.dtype} has no zero points", "True")

    def algorithm_options(self) -> dict[str, Any]:
        """The options of bitwright's algorithm of this name that the fields stand for."""
        raise NotImplementedError

    @property
    def local(self) -> tuple[LocalRule, ...]:
        """The rules for some layers, in the order in which they were set: the last that matches wins."""
        return tuple(LocalRule(pattern, is_type, config) for (pattern, is_type), config in self._local.items())

    def set_local(self, operator: Operator, config: WeightOnlyConfig) -> Self:
        """Give the layers named ``operator`` a configuration of their own.

        ``operator`` is a layer's name, a regular expression for whole names, a class of layers (``torch.nn.Linear`` or
        ``"Linear"``), or several of these. A later rule is stronger than an earlier one.

        Raises:
            TypeError: if ``config`` is no configuration, or ``operator`` is nothing of the above.
        """
        if not isinstance(config, WeightOnlyConfig):
            raise TypeError(f"set_local takes a configuration such as RTNConfig, not {type(config).__name__}")
        for each in operator if isinstance(operator, list | tuple) else [operator]:
            if not isinstance(each, str) and not (isinstance(each, type) and issubclass(each, nn.Module)):
                raise TypeError(f"set_local takes layer names, patterns or classes of layers, not {each!r}")
            key = (each, False) if isinstance(each, str) else (each.__name__, True)
            self._local.pop(key, None)  # set again, it is the last
            self._local[key] = config
        return self

    def to_dict(self) -> dict[str, Any]:
        """The fields, ready for JSON; with rules for some layers: ``{"global": {...}, "local": {name: {...}}}``."""
        fields = {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        if not self._local:
            return fields
        rules: dict[str, Any] = {}
        for rule in self.local:
            same = rule.config.algorithm == self.algorithm
            rules[rule.key] = rule.config.to_dict() if same else {rule.config.algorithm: rule.config.to_dict()}
        return {GLOBAL: fields, LOCAL: rules}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of :meth:`to_dict`; the fields may also stand below the algorithm's name.

        Raises:
            ValueError, TypeError: naming what is unknown or out of range.
        """
        if not isinstance(values, Mapping):
            raise TypeError(f"{cls.__name__} is read from a dictionary, not {type(values).__name__}")
        if set(values) == {cls.algorithm}:
            values = values[cls.algorithm]
        if not {GLOBAL, LOCAL} & set(values):
            return cls(**values)
        unknown = sorted(set(values) - {GLOBAL, LOCAL})
        if unknown:
            message = f"{cls.__name__}: {unknown[0]!r} stands beside {GLOBAL!r} or {LOCAL!r}"
            raise ArgumentError("BW201", message, suggestion=f"put it into {GLOBAL!r}")
        config = cls(**(values.get(GLOBAL) or {}))
        for name, fields in (values.get(LOCAL) or {}).items():
            config.set_local(name, cls._local_from(fields))
        return config

    @classmethod
    def _local_from(cls, fields: Mapping[str, Any]) -> WeightOnlyConfig:
        kinds = {kind.algorithm: kind for kind in _kinds(WeightOnlyConfig) if "algorithm" in vars(kind)}
        only = next(iter(fields), None) if len(fields) == 1 else None
        return kinds[only].from_dict(fields) if only in kinds else cls(**fields)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def to_json_string(self) -> str:
        """Another name of :meth:`to_json`."""
        return self.to_json()

    def to_json_file(self, path: str | Path) -> None:
        write_file(Path(path), [self.to_json().encode()])

    @classmethod
    def from_json_file(cls, path: str | Path) -> Self:
        """Read what :meth:`to_json_file` wrote, or the same below the algorithm's name.

        Raises:
            ValueError: if the file is not JSON, or its values are not accepted.
        """
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, WeightOnlyConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]


def _kinds(kind: type[WeightOnlyConfig]) -> list[type[WeightOnlyConfig]]:
    return [below for child in kind.__subclasses__() for below in (child, *_kinds(child))]


def _plain(value: Any) -> Any:
    """A value of a field as JSON has it: ``{"W8A16"}``, the document's short form for a layer, is a name."""
    if isinstance(value, set | frozenset):
        return next(iter(value)) if len(value) == 1 else sorted(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return value
