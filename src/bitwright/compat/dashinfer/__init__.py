"""DashInfer's names: how its documentation chooses the numbers that a model runs in, and its engine, ``allspark``.

A GPTQ checkpoint is adapted to (``A8W8``, or ``A16W8`` with ``weight_only_quant=True``, and likewise for 4 bits); any
other model is given an instant quantization by a configuration.

Example:
    >>> from bitwright.compat.dashinfer import load
    >>> model = load("Qwen2-7B-Instruct-GPTQ-Int8", enable_quant=True, weight_only_quant=True)
    >>> model = load("Qwen2-7B-Instruct", enable_quant=True,
    ...              customized_quant_config={"quant_method": "instant_quant", "weight_format": "int8"})
"""

from __future__ import annotations

from bitwright.compat.dashinfer.adaptation import Adaptation, adapt, load, serialize
from bitwright.compat.dashinfer.instant_quant import InstantQuantConfig

__all__ = ["Adaptation", "InstantQuantConfig", "adapt", "load", "serialize"]
