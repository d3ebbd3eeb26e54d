"""Weight-only quantization by the document's names."""

from __future__ import annotations

from bitwright.compat.neural_compressor.torch.quantization.autoround_config import AutoRoundConfig
from bitwright.compat.neural_compressor.torch.quantization.configs import (
    AWQConfig,
    GPTQConfig,
    HQQConfig,
    RTNConfig,
    TEQConfig,
)
from bitwright.compat.neural_compressor.torch.quantization.defaults import (
    get_default_auto_round_config,
    get_default_awq_config,
    get_default_gptq_config,
    get_default_hqq_config,
    get_default_rtn_config,
    get_default_teq_config,
)
from bitwright.compat.neural_compressor.torch.quantization.fp8_inputs import HybridGPTQConfig, finalize_calibration
from bitwright.compat.neural_compressor.torch.quantization.quantize import convert, prepare, quantize
from bitwright.compat.neural_compressor.torch.quantization.saving import load, save
from bitwright.compat.neural_compressor.torch.quantization.tuning import TuningConfig, autotune
from bitwright.compat.neural_compressor.torch.quantization.weight_only_linear import WeightOnlyLinear

__all__ = [
    "AWQConfig",
    "AutoRoundConfig",
    "GPTQConfig",
    "HQQConfig",
    "HybridGPTQConfig",
    "RTNConfig",
    "TEQConfig",
    "TuningConfig",
    "WeightOnlyLinear",
    "autotune",
    "convert",
    "finalize_calibration",
    "get_default_auto_round_config",
    "get_default_awq_config",
    "get_default_gptq_config",
    "get_default_hqq_config",
    "get_default_rtn_config",
    "get_default_teq_config",
    "load",
    "prepare",
    "quantize",
    "save",
]
