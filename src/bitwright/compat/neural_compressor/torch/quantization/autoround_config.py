"""The configuration of AutoRound, which has presets and a form of its own for rules about some layers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from bitwright.compat.neural_compressor.torch.quantization.config import FLOAT, WeightOnlyConfig
from bitwright.compat.neural_compressor.torch.quantization.fields import (
    Accepted,
    accept_aliases,
    flag,
    fraction,
    one_of,
    optional,
    path,
    setting,
    whole,
)
from bitwright.core.errors import ArgumentError

__all__ = ["AutoRoundConfig"]

PRESET = re.compile(r"W([1-8])A16(?:G(-1|[1-9][0-9]*))?", re.IGNORECASE)
PRESETS = "W<bits>A16, for example 'W4A16', 'W2A16', or with a group size 'W2A16G64'"
SCALE_DTYPES = ("float16", "bfloat16", "float32", "fp16", "bf16", "fp32")
# What a rule of layer_config may say, and the field that it is.
LAYER_FIELDS = {"data_type": "dtype", "bits": "bits", "group_size": "group_size", "sym": "use_sym"}


def _is_preset(value: Any) -> bool:
    return isinstance(value, str) and PRESET.fullmatch(value) is not None


def _preset(name: str) -> dict[str, Any]:
    """The fields of a preset: symmetric integers, groups of 128 unless it says otherwise."""
    match = PRESET.fullmatch(name)
    assert match is not None
    return {"bits": int(match[1]), "group_size": int(match[2] or 128), "use_sym": True}


@accept_aliases(nsamples="n_samples", nblocks="n_blocks")
@dataclass(kw_only=True, eq=False)
class AutoRoundConfig(WeightOnlyConfig):
    """AutoRound; ``nsamples`` and ``nblocks`` are other names of ``n_samples`` and ``n_blocks``.

    Attributes:
        scheme: a preset of ``bits``, ``group_size`` and ``use_sym``; what is given explicitly is stronger.
        lr: the first step; 0: 1 / iters. ``minmax_lr``: that of ranges; ``None``: as ``lr``.
        n_samples: calibration samples that are used, at most; ``seqlen``: tokens of a sample, at most.
        n_blocks: blocks that are tuned together.
        layer_config: rules for some layers, by name: ``{"lm_head": {"data_type": "int", "bits": 8}}`` or
            ``{"lm_head": {"W8A16"}}``. What a rule does not say is as in the preset.
    """

    algorithm: ClassVar[str] = "autoround"

    bits: int = setting(None, optional(whole(1, 8)))
    group_size: int = setting(None, optional(whole(1, None, -1)))
    use_sym: bool = setting(None, optional(flag()))
    enable_full_range: bool = setting(False, flag())
    batch_size: int = setting(8, whole(1))
    lr_scheduler: str | None = setting(None, optional(one_of("linear", "constant")))
    enable_quanted_input: bool = setting(True, flag())
    enable_minmax_tuning: bool = setting(True, flag())
    lr: float = setting(0, fraction(0.0, 1.0))
    minmax_lr: float | None = setting(None, optional(fraction(0.0, 1.0)))
    low_gpu_mem_usage: bool = setting(True, flag())
    iters: int = setting(200, whole(0))
    seqlen: int = setting(2048, whole(1))
    n_samples: int = setting(512, whole(1))
    sampler: str = setting("rand", one_of("rand", "sequential"))
    seed: int = setting(42, whole(0))
    n_blocks: int = setting(1, whole(1))
    gradient_accumulate_steps: int = setting(1, whole(1))
    not_use_best_mse: bool = setting(False, flag())
    dynamic_max_gap: int = setting(-1, whole(1, None, -1))
    scale_dtype: str = setting("float16", one_of(*SCALE_DTYPES))
    scheme: str = setting("W4A16", Accepted(_is_preset, PRESETS))
    layer_config: Mapping[str, Any] | None = setting(
        None, optional(Accepted(lambda value: isinstance(value, Mapping), "a dictionary of rules by layer name"))
    )
    use_layer_wise: bool = setting(False, flag())
    model_path: str = setting("", path())

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "scheme" and "_built" in self.__dict__:
            for field, preset in _preset(value).items():
                super().__setattr__(field, preset)

    def __post_init__(self) -> None:
        for field, value in _preset(self.scheme).items():
            if getattr(self, field) is None:
                setattr(self, field, value)
        super().__post_init__()
        for name, rule in (self.layer_config or {}).items():
            self.set_local(name, self._layer_rule(name, rule))

    def check(self) -> None:
        super().check()
        if self.use_double_quant:
            self.refuse("use_double_quant", "but AutoRound has no double quantization", "False (RTN, GPTQ, TEQ)")
        if self.dtype not in ("int", FLOAT):
            self.refuse("dtype", "but AutoRound learns how to round whole numbers", "'int', 'fp32'")
        if self.enable_full_range and not self.use_sym:
            self.refuse(
                "enable_full_range", "but only symmetric integers have a code that is not used otherwise", "False"
            )
        if self.bits == 1 and self.use_sym:
            self.refuse("bits", "but one symmetric bit is a sign, with nothing to round", "2 to 8, or use_sym=False")

    def to_dict(self) -> dict[str, Any]:
        """As of every configuration; rules of ``layer_config`` are not repeated as local ones."""
        values = super().to_dict()
        if "local" not in values:
            return values
        own = set(self.layer_config or {})
        rules = {name: rule for name, rule in values["local"].items() if name not in own}
        return {"global": values["global"], "local": rules} if rules else dict(values["global"])

    def algorithm_options(self) -> dict[str, Any]:
        return {
            "iters": self.iters,
            "lr": self.lr or None,
            "minmax_tuning": self.enable_minmax_tuning,
            "minmax_lr": self.minmax_lr or None,
            "lr_scheduler": self.lr_scheduler or "linear",
            "batch_size": self.batch_size,
            "gradient_accumulate_steps": self.gradient_accumulate_steps,
            "sampler": self.sampler,
            "quantized_input": self.enable_quanted_input,
            "not_use_best_mse": self.not_use_best_mse,
            "dynamic_max_gap": self.dynamic_max_gap,
            "full_range": self.enable_full_range,
            "n_blocks": self.n_blocks,
            "range": "full" if self.enable_full_range else "restricted",
        }

    def _layer_rule(self, name: str, rule: Any) -> AutoRoundConfig:
        if isinstance(rule, set | frozenset) and len(rule) == 1:
            rule = next(iter(rule))
        base = _plain_fields(self)
        if isinstance(rule, str):
            if not _is_preset(rule):
                raise ArgumentError("BW201", f"layer_config of {name!r} is {rule!r}", suggestion=PRESETS)
            return AutoRoundConfig(**(base | _preset(rule)))
        if not isinstance(rule, Mapping):
            accepted = "a dictionary, or the name of a preset"
            raise ArgumentError("BW201", f"layer_config of {name!r} is {rule!r}", suggestion=accepted)
        for field in rule:
            if field not in LAYER_FIELDS:
                accepted = ", ".join(LAYER_FIELDS)
                raise ArgumentError("BW201", f"layer_config of {name!r} has {field!r}", suggestion=f"one of {accepted}")
        return AutoRoundConfig(**(base | {LAYER_FIELDS[field]: value for field, value in rule.items()}))


def _plain_fields(config: AutoRoundConfig) -> dict[str, Any]:
    """The fields of a configuration without its rules for layers."""
    return {field.name: getattr(config, field.name) for field in fields(config) if field.name != "layer_config"}
