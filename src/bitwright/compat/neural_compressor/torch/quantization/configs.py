"""The configuration of each algorithm, with the fields and defaults of the document's tables."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from bitwright.compat.neural_compressor.torch.quantization.config import FLOAT, WeightOnlyConfig
from bitwright.compat.neural_compressor.torch.quantization.fields import (
    accept_aliases,
    flag,
    fraction,
    one_of,
    path,
    setting,
    whole,
)

__all__ = ["AWQConfig", "GPTQConfig", "HQQConfig", "RTNConfig", "TEQConfig"]


@dataclass(kw_only=True, eq=False)
class _RangedConfig(WeightOnlyConfig):
    """The arguments of those that choose ranges as rounding to nearest does."""

    group_dim: int = setting(1, one_of(0, 1))
    use_full_range: bool = setting(False, flag())
    use_mse_search: bool = setting(False, flag())
    use_layer_wise: bool = setting(False, flag())

    def check(self) -> None:
        super().check()
        if self.use_full_range and (self.dtype not in (FLOAT, "int") or not self.use_sym):
            self.refuse("use_full_range", "but only symmetric integers have a code that is not used otherwise", "False")
        if self.use_full_range and self.bits == 1:
            self.refuse("use_full_range", "but both codes of one bit are used in any case", "False")

    def algorithm_options(self) -> dict[str, Any]:
        return {"range": "full" if self.use_full_range else "restricted", "search": self.use_mse_search}


@dataclass(kw_only=True, eq=False)
class RTNConfig(_RangedConfig):
    """Round to nearest.

    Attributes:
        group_dim: 1: groups run along the input features; 0: along the output features.
        use_full_range: symmetric ranges that use the lowest code too.
        use_mse_search: try narrower ranges and keep the one of least squared error, per group.
        use_layer_wise: keep one block of float weights in memory at a time; for models of ``load_empty_model``.
        model_path: where the float weights are, if the model was not made by ``load_empty_model``.
    """

    algorithm: ClassVar[str] = "rtn"

    model_path: str = setting("", path())


@accept_aliases(hybrid_order="hybrid_act_order")
@dataclass(kw_only=True, eq=False)
class GPTQConfig(WeightOnlyConfig):
    """GPTQ; ``hybrid_order`` is another name of ``hybrid_act_order``.

    Attributes:
        act_order: quantize columns in descending order of their activations.
        hybrid_act_order: reorder inside groups, and groups as wholes; no column leaves its group.
        percdamp: share of the Hessian's mean diagonal that is added to the diagonal.
        block_size: columns that are worked on before the rest is updated.
        static_groups: find all scales before the first column is quantized.
        true_sequential: quantize the layers of a block in the order in which they run, each behind quantized ones.
        fp8_aware: first round weights to fp8 (e4m3), then quantize so that every stored weight is such a number.
        protective_range: leave room below the largest fp8 number, so that no 4-bit code decodes beyond it. Here that
            room is always left with ``fp8_aware``.
    """

    algorithm: ClassVar[str] = "gptq"

    use_mse_search: bool = setting(False, flag())
    use_layer_wise: bool = setting(False, flag())
    model_path: str = setting("", path())
    act_order: bool = setting(False, flag())
    hybrid_act_order: bool = setting(False, flag())
    percdamp: float = setting(0.01, fraction(0.0, 1.0))
    block_size: int = setting(128, whole(1))
    static_groups: bool = setting(False, flag())
    true_sequential: bool = setting(False, flag())
    fp8_aware: bool = setting(False, flag())
    protective_range: bool = setting(False, flag())

    def check(self) -> None:
        super().check()
        if self.act_order and self.hybrid_act_order:
            self.refuse("act_order", "and so is hybrid_act_order; there is one order", "one of the two")
        if self.fp8_aware and self.dtype not in ("int", FLOAT):
            self.refuse("fp8_aware", f"but the dtype is {self.dtype}", "False, or dtype 'int'")
        if self.fp8_aware and self.bits > 4:
            self.refuse("bits", "but with fp8_aware every code must be an e4m3 number", "1 to 4")
        if self.fp8_aware and self.use_double_quant:
            self.refuse("use_double_quant", "but with fp8_aware scales are powers of two", "False")

    def algorithm_options(self) -> dict[str, Any]:
        return {
            "act_order": self.act_order,
            "group_aware": self.hybrid_act_order,
            "static_groups": self.static_groups,
            "true_sequential": self.true_sequential,
            "block_size": self.block_size,
            "damp": self.percdamp,
            "search": "plain" if self.use_mse_search else "none",
            "fp8_aware": self.fp8_aware,
        }


@dataclass(kw_only=True, eq=False)
class AWQConfig(_RangedConfig):
    """AWQ.

    Attributes:
        use_auto_scale: search scales for the channels that meet large activations.
        use_auto_clip: search narrower ranges.
        folding: only use scales that the layer before can absorb; otherwise an input may be multiplied at run time.
    """

    algorithm: ClassVar[str] = "awq"

    use_auto_scale: bool = setting(True, flag())
    use_auto_clip: bool = setting(True, flag())
    folding: bool = setting(False, flag())

    def check(self) -> None:
        super().check()
        _refuse_double_quant(self)

    def algorithm_options(self) -> dict[str, Any]:
        own = {"scale": self.use_auto_scale, "clip": self.use_auto_clip, "folding": self.folding}
        ranges = super().algorithm_options()
        return own | {f"{stage}.{name}": value for name, value in ranges.items() for stage in ("awq", "rtn")}


@dataclass(kw_only=True, eq=False)
class TEQConfig(_RangedConfig):
    """TEQ: scales as AWQ's, but trained. ``folding`` as there."""

    algorithm: ClassVar[str] = "teq"

    folding: bool = setting(False, flag())

    def algorithm_options(self) -> dict[str, Any]:
        ranges = super().algorithm_options()
        own = {"folding": self.folding}
        return own | {f"{stage}.{name}": value for name, value in ranges.items() for stage in ("teq", "rtn")}


@dataclass(kw_only=True, eq=False)
class HQQConfig(WeightOnlyConfig):
    """HQQ.

    Attributes:
        quant_zero: store zero points as integers.
        quant_scale: store scales as 8-bit integers, in groups of ``scale_quant_group_size``.
    """

    algorithm: ClassVar[str] = "hqq"

    group_size: int = setting(64, whole(1, None, -1))
    use_sym: bool = setting(False, flag())
    quant_zero: bool = setting(True, flag())
    quant_scale: bool = setting(False, flag())
    scale_quant_group_size: int = setting(128, whole(1, None, -1))

    def check(self) -> None:
        if self.dtype not in ("int", FLOAT):
            self.refuse("dtype", "but HQQ moves zero points, which a table does not have", "'int', 'fp32'")
        super().check()
        _refuse_double_quant(self)

    def algorithm_options(self) -> dict[str, Any]:
        return {}


def _refuse_double_quant(config: WeightOnlyConfig) -> None:
    if config.use_double_quant:
        config.refuse(
            "use_double_quant", f"but {config.algorithm} has no double quantization", "False (RTN, GPTQ, TEQ)"
        )
