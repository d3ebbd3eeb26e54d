"""Every field of every configuration reaches what is stored or how it is found: none is accepted and then ignored."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bitwright.compat.neural_compressor.torch.quantization import (
    AutoRoundConfig,
    AWQConfig,
    GPTQConfig,
    HQQConfig,
    RTNConfig,
    TEQConfig,
)
from bitwright.compat.neural_compressor.torch.quantization.config import WeightOnlyConfig
from bitwright.compat.neural_compressor.torch.quantization.rules import weight_scheme
from bitwright.quantization.algorithms import make_method

KINDS = (RTNConfig, GPTQConfig, AWQConfig, TEQConfig, HQQConfig, AutoRoundConfig)
# Another value than the default, by field; "not": the other of True and False.
OTHERS: dict[str, Any] = {
    "dtype": "nf4", "bits": 3, "group_size": 16, "double_quant_bits": 6, "double_quant_group_size": 64, "group_dim": 0,
    "percdamp": 0.05, "block_size": 64, "scale_quant_group_size": 64, "batch_size": 4, "lr_scheduler": "constant",
    "lr": 0.02, "minmax_lr": 0.03, "iters": 7, "sampler": "sequential", "n_blocks": 2, "gradient_accumulate_steps": 3,
    "dynamic_max_gap": 5, "scale_dtype": "float32", "scheme": "W2A16G64",
}  # fmt: skip
NEEDS: dict[str, dict[str, Any]] = {
    "double_quant_bits": {"use_double_quant": True},
    "double_quant_use_sym": {"use_double_quant": True},
    "double_quant_group_size": {"use_double_quant": True},
    "scale_quant_group_size": {"quant_scale": True},
}
# What they do is tested where it is done, or the documentation says that it is done in any case.
ELSEWHERE = {
    "quant_lm_head", "use_layer_wise", "model_path", "seed", "n_samples", "seqlen", "layer_config",
    "low_gpu_mem_usage", "protective_range", "double_quant_dtype",
}  # fmt: skip
REFUSED = {
    (AWQConfig, "use_double_quant"), (HQQConfig, "use_double_quant"), (AutoRoundConfig, "use_double_quant"),
    (HQQConfig, "dtype"), (AutoRoundConfig, "dtype"),
}  # fmt: skip
FIELDS = [
    (kind, field.name)
    for kind in KINDS
    for field in dataclasses.fields(kind)
    if field.name not in ELSEWHERE and (kind, field.name) not in REFUSED
    if (kind, next(iter(NEEDS.get(field.name, {"": True})))) not in REFUSED
]


def effect(config: WeightOnlyConfig) -> tuple[str, dict[str, dict[str, Any]]]:
    """What is stored, and the options of each stage of the algorithm."""
    method = make_method(config.algorithm, config.algorithm_options())
    return weight_scheme(config).name, {stage: dataclasses.asdict(options) for stage, options in method.options.items()}


@pytest.mark.parametrize(("kind", "field"), FIELDS, ids=[f"{kind.__name__}-{field}" for kind, field in FIELDS])
def test_every_field_counts(kind: type[WeightOnlyConfig], field: str) -> None:
    needed = NEEDS.get(field, {})
    base = kind(**needed)
    value = OTHERS[field] if field in OTHERS else not getattr(base, field)
    assert effect(kind(**needed, **{field: value})) != effect(base)


def test_the_ranges_of_equalizers_are_those_of_the_rounding_after_them() -> None:
    for kind in (AWQConfig, TEQConfig):
        options = effect(kind(use_full_range=True, use_mse_search=True))[1]
        assert all(options[stage]["range"] == "full" and options[stage]["search"] for stage in (kind.algorithm, "rtn"))
    tuned = effect(AutoRoundConfig(enable_full_range=True))[1]
    assert tuned["autoround"]["full_range"] and tuned["rtn"]["range"] == "full"


def test_values_arrive_as_they_are() -> None:
    options = effect(GPTQConfig(percdamp=0.05, block_size=64, static_groups=True, use_mse_search=True))[1]["gptq"]
    assert (options["damp"], options["block_size"], options["static_groups"]) == (0.05, 64, True)
    assert (options["search"], options["act_order"], options["group_aware"]) == ("plain", False, False)
    tuned = effect(AutoRoundConfig(lr=0.02, minmax_lr=0.03, iters=7, batch_size=4, gradient_accumulate_steps=3))[1]
    wanted = {"lr": 0.02, "minmax_lr": 0.03, "iters": 7, "batch_size": 4, "gradient_accumulate_steps": 3}
    assert {name: tuned["autoround"][name] for name in wanted} == wanted
    by_itself = effect(AutoRoundConfig())[1]["autoround"]
    assert by_itself["lr"] is None and by_itself["minmax_lr"] is None and by_itself["lr_scheduler"] == "linear"
