"""Quantize language models, prove the result, run it.

Every name below is loaded when it is first used, so that ``import bitwright`` costs nothing and works without a GPU.

Example:
    >>> import bitwright
    >>> report = bitwright.quantize("demo:", "out", scheme="w4g128")
    >>> model = bitwright.load("out")
    >>> comparison = bitwright.eval(["out"], reference="demo:")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from bitwright.core.memory import no_collections

if TYPE_CHECKING:
    from bitwright.cli.demo import demo
    from bitwright.cli.doctor import doctor
    from bitwright.cli.inspection import inspect
    from bitwright.core.errors import BitwrightError, explain
    from bitwright.core.qtensor import QuantizedTensor
    from bitwright.core.scheme import LayerScheme, QuantScheme
    from bitwright.core.scheme_names import parse
    from bitwright.engine.engine import Engine
    from bitwright.evaluation.comparison import evaluate as eval
    from bitwright.models.generation import generate
    from bitwright.models.kv_cache import QuantizedCache
    from bitwright.models.loading import load
    from bitwright.quantization.api import quantize
    from bitwright.quantization.kv_calibration import calibrate
    from bitwright.quantization.session import convert, prepare, quantize_module

__version__ = "0.1.0"

__all__ = [
    "BitwrightError",
    "Engine",
    "LayerScheme",
    "QuantScheme",
    "QuantizedCache",
    "QuantizedTensor",
    "__version__",
    "calibrate",
    "convert",
    "demo",
    "doctor",
    "eval",
    "explain",
    "generate",
    "inspect",
    "load",
    "parse",
    "prepare",
    "quantize",
    "quantize_module",
]

# Where each public name lives: module and, if it is called otherwise there, its name.
SOURCES = {
    "BitwrightError": "core.errors",
    "Engine": "engine.engine",
    "LayerScheme": "core.scheme",
    "QuantScheme": "core.scheme",
    "QuantizedCache": "models.kv_cache",
    "QuantizedTensor": "core.qtensor",
    "calibrate": "quantization.kv_calibration",
    "convert": "quantization.session",
    "demo": "cli.demo",
    "doctor": "cli.doctor",
    "eval": "evaluation.comparison:evaluate",
    "explain": "core.errors",
    "generate": "models.generation",
    "inspect": "cli.inspection",
    "load": "models.loading",
    "parse": "core.scheme_names",
    "prepare": "quantization.session",
    "quantize": "quantization.api",
    "quantize_module": "quantization.session",
}


def __getattr__(name: str) -> object:
    """Import a public name at its first use (PEP 562)."""
    if name not in SOURCES:
        raise AttributeError(f"module 'bitwright' has no attribute {name!r}")
    module, _, original = SOURCES[name].partition(":")
    with no_collections(freeze=False):  # what the caller has left behind is not ours to keep
        loaded = importlib.import_module(f"bitwright.{module}")
    value: object = getattr(loaded, original or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
