"""The record written beside every checkpoint: what was done to each layer, how, and what it cost."""

from __future__ import annotations

import platform
import resource
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from bitwright import __version__
from bitwright.models.hf import VERSION as TRANSFORMERS_VERSION
from bitwright.quantization.rows import layer_error

__all__ = ["REPORT_FILE", "Report", "host_facts", "peak_resident_bytes", "versions"]

REPORT_FILE = "report.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What a quantization run did. Only ``run`` (times and host facts) may differ between equal runs.

    Attributes:
        layers: by name: scheme, shape, bits per weight (scales and zeros included), relative error of the weights
            (Frobenius), and, of calibrated runs, the error weighted by the squares of the inputs.
        blocks: relative squared error of each block's output; calibrated runs only.
        bits_per_weight: over all quantized layers.
        run: seconds, peak resident bytes, host, date.
    """

    source: str
    format: str
    recipe: Mapping[str, Any]
    calibration: Mapping[str, Any] | None
    layers: Mapping[str, Mapping[str, Any]]
    blocks: Mapping[str, float]
    unquantized: tuple[str, ...]
    parameters: int
    quantized_parameters: int
    bits_per_weight: float
    source_bytes: int
    weight_bytes: int
    notices: tuple[str, ...]
    versions: Mapping[str, str]
    run: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def worst_layers(self, count: int = 5) -> list[tuple[str, float]]:
        """The layers of largest :func:`.rows.layer_error`, largest first."""
        errors = [(name, layer_error(row)) for name, row in self.layers.items()]
        return sorted(errors, key=lambda pair: -pair[1])[:count]


def versions() -> dict[str, str]:
    """The versions that a result can depend on."""
    return {"bitwright": __version__, "torch": torch.__version__, "transformers": TRANSFORMERS_VERSION}


def host_facts() -> dict[str, Any]:
    return {"machine": platform.machine(), "python": platform.python_version(), "threads": torch.get_num_threads()}


def peak_resident_bytes() -> int:
    """The largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
