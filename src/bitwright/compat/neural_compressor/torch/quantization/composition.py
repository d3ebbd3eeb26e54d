"""Several algorithms for one model, each with its own configuration; and configurations as dictionaries."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.compat.neural_compressor.torch.quantization.autoround_config import AutoRoundConfig
from bitwright.compat.neural_compressor.torch.quantization.config import FLOAT, GLOBAL, LOCAL, WeightOnlyConfig
from bitwright.compat.neural_compressor.torch.quantization.configs import (
    AWQConfig,
    GPTQConfig,
    HQQConfig,
    RTNConfig,
    TEQConfig,
)
from bitwright.core.errors import ArgumentError

__all__ = ["CONFIGS", "ComposedConfig", "Member", "read_config"]

CONFIGS: dict[str, type[WeightOnlyConfig]] = {
    kind.algorithm: kind for kind in (RTNConfig, GPTQConfig, AWQConfig, TEQConfig, HQQConfig, AutoRoundConfig)
}
ALIASES = {"auto_round": AutoRoundConfig.algorithm}


@dataclass(frozen=True, slots=True)
class Member:
    """One algorithm's configuration; its own fields count for layers that no rule names only if it ``has_global``."""

    config: WeightOnlyConfig
    has_global: bool = True


@dataclass(frozen=True, slots=True)
class ComposedConfig:
    """Configurations of several algorithms for the layers of one model.

    Raises:
        ArgumentError: BW201 (a ``ValueError``) if more than one would quantize the layers that no rule names.
    """

    members: tuple[Member, ...]

    def __post_init__(self) -> None:
        general = [member.config.algorithm for member in self.members if member.has_global and _quantizes(member)]
        if len(general) > 1:
            message = f"{' and '.join(general)} would both quantize every layer"
            accepted = f"one {GLOBAL!r}, and {LOCAL!r} rules for the other algorithms"
            raise ArgumentError("BW201", message, suggestion=accepted)

    def to_dict(self) -> dict[str, Any]:
        """By algorithm; the inverse of :func:`read_config`."""
        values = {}
        for member in self.members:
            fields = member.config.to_dict()
            values[member.config.algorithm] = fields if member.has_global else {LOCAL: fields.get(LOCAL, {})}
        return values

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2) + "\n"


def read_config(config: WeightOnlyConfig | ComposedConfig | Mapping[str, Any] | str | Path) -> ComposedConfig:
    """Any way of writing a configuration down, as a :class:`ComposedConfig`.

    A dictionary has algorithms for keys (``rtn``, ``gptq``, ``awq``, ``teq``, ``hqq``, ``autoround``), below each the
    fields, or ``{"global": fields, "local": {name: fields}}``. Where one algorithm stands alone, ``global`` may be left
    out, and is the algorithm's default then. Where several stand together, one without ``global`` has only the layers
    of its rules. A path is that of a JSON file of such a dictionary.

    Raises:
        ValueError, TypeError: naming what is unknown, out of range or in conflict.
    """
    if isinstance(config, ComposedConfig):
        return config
    if isinstance(config, WeightOnlyConfig):
        return ComposedConfig((Member(config),))
    if isinstance(config, str | Path):
        config = json.loads(Path(config).read_text(encoding="utf-8"))
    if not isinstance(config, Mapping) or not config:
        raise TypeError(f"a configuration such as RTNConfig(), or a dictionary, not {config!r}")
    members = []
    for name, fields in config.items():
        kind = CONFIGS.get(ALIASES.get(name, name))
        if kind is None:
            raise ArgumentError("BW201", f"unknown algorithm {name!r}", suggestion="one of " + ", ".join(CONFIGS))
        is_general = len(config) == 1 or GLOBAL in fields or LOCAL not in fields
        members.append(Member(kind.from_dict(fields), is_general))
    return ComposedConfig(tuple(members))


def _quantizes(member: Member) -> bool:
    return member.config.dtype != FLOAT
