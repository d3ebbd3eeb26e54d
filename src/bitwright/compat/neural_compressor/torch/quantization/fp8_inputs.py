"""Four-bit weights with fp8 (e4m3) activations: scales are measured first, then inputs are rounded with them."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn

from bitwright.compat.neural_compressor.torch.quantization.fields import (
    Accepted,
    CheckedFields,
    one_of,
    path,
    setting,
)
from bitwright.compat.neural_compressor.torch.quantization.weight_only_linear import WeightOnlyLinear
from bitwright.core.errors import ArgumentError, BitwrightError, Notice
from bitwright.formats.checkpoint import list_names
from bitwright.formats.storage import make_directory, write_file

__all__ = ["HybridGPTQConfig", "Measurement", "finalize_calibration", "round_inputs", "start_measuring"]

ATTRIBUTE = "_bitwright_measurement"
LARGEST = 240.0  # the largest e4m3 number of units that keep one exponent for infinity; others reach 448
MEASURE, QUANTIZE, AUTO = "MEASURE", "QUANTIZE", "AUTO"
LISTS = ("types", "names")
FORMAT, VERSION = "bitwright.activation_maxima", 1


def _is_list(value: Any) -> bool:
    return value is None or (
        isinstance(value, Mapping)
        and all(
            key in LISTS and isinstance(entries, list | tuple) and all(isinstance(entry, str) for entry in entries)
            for key, entries in value.items()
        )
    )


LAYERS = Accepted(_is_list, '{"types": [class names], "names": [layer names or expressions]}; or None')


@dataclass(kw_only=True)
class HybridGPTQConfig(CheckedFields):
    """How the inputs of 4-bit layers are measured and rounded.

    Attributes:
        mode: ``MEASURE`` for :func:`prepare`, ``QUANTIZE`` for :func:`convert`, ``AUTO`` for both.
        observer: ``maxabs``: the largest magnitude that a layer reads.
        scale_method: how that becomes a scale: ``maxabs_pow2`` (and ``maxabs_hw``): the next power of two;
            ``maxabs_arbitrary``: itself; ``unit_scale``: 1.
        fp8_config: ``E4M3``.
        allowlist: the layers concerned, by class (``WeightOnlyLinear``, ``Linear``) or name; all if empty.
        blocklist: layers that are left out.
        dump_stats_path: where measured maxima are kept: the file of this name, ``.json`` added.
        quantize_weight: weights are 4-bit already; must be False.
    """

    mode: str = setting(AUTO, one_of(MEASURE, QUANTIZE, AUTO))
    observer: str = setting("maxabs", one_of("maxabs"))
    scale_method: str = setting("maxabs_hw", one_of("maxabs_hw", "maxabs_pow2", "maxabs_arbitrary", "unit_scale"))
    fp8_config: str = setting("E4M3", one_of("E4M3"))
    allowlist: Mapping[str, Any] | None = setting(None, LAYERS)
    blocklist: Mapping[str, Any] | None = setting(None, LAYERS)
    dump_stats_path: str = setting("./hqt_output/measure", path())
    quantize_weight: bool = setting(False, Accepted(lambda value: value is False, "False"))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """From fields by name.

        Raises:
            ValueError, TypeError: naming the field that is unknown or out of range.
        """
        return cls(**values)

    @classmethod
    def from_json_file(cls, path: str | Path) -> Self:
        """From a JSON file of fields by name; raises as :meth:`from_dict`."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def to_json_file(self, path: str | Path) -> None:
        write_file(Path(path), [(json.dumps(self.to_dict(), indent=2) + "\n").encode()])

    @property
    def stats_file(self) -> Path:
        return Path(f"{self.dump_stats_path}.json")

    def concerns(self, name: str) -> bool:
        """Whether the lists let the layer ``name`` be measured and rounded."""
        allowed = not self.allowlist or not any(self.allowlist.values()) or _listed(name, self.allowlist)
        return allowed and not (self.blocklist and _listed(name, self.blocklist))

    def scale(self, largest: float) -> float:
        """The scale of inputs of at most the magnitude ``largest``."""
        if self.scale_method == "unit_scale" or largest == 0:
            return 1.0
        exact = largest / LARGEST
        return exact if self.scale_method == "maxabs_arbitrary" else 2.0 ** math.ceil(math.log2(exact))


@dataclass(eq=False)
class Measurement:
    """The largest magnitude that each layer has read, and the hooks that see to it."""

    config: HybridGPTQConfig
    maxima: dict[str, float]
    handles: list[Any]
    is_final: bool = False

    def note(self, name: str, layer: WeightOnlyLinear, inputs: tuple[Tensor, ...]) -> None:
        if inputs[0].numel():
            read = inputs[0].detach()
            largest = float((read if layer.input_scale is None else read * layer.input_scale).abs().amax())
            if not math.isfinite(largest):
                raise BitwrightError("BW601", f"{name} read NaN or infinity", suggestion="check the model and the data")
            self.maxima[name] = max(self.maxima.get(name, 0.0), largest)


def start_measuring(model: nn.Module, config: HybridGPTQConfig) -> nn.Module:
    """Note, from now on, the largest magnitude that each quantized layer of ``model`` reads.

    Raises:
        ArgumentError: BW201 if there are no such layers, or the configuration is not one for measuring.
    """
    if config.mode == QUANTIZE:
        raise ArgumentError("BW201", "prepare got a configuration of mode QUANTIZE", suggestion="mode MEASURE or AUTO")
    layers = _layers(model, config)
    measurement = Measurement(config, {}, [])
    for name, layer in layers.items():
        measurement.handles.append(layer.register_forward_pre_hook(partial(measurement.note, name)))
    model.__dict__[ATTRIBUTE] = measurement
    return model


def finalize_calibration(model: nn.Module) -> None:
    """End the measurement of a model that was prepared with a :class:`HybridGPTQConfig`, and keep what it found.

    Raises:
        ArgumentError: BW201 if the model was not prepared so.
        BitwrightError: BW401 if it was not run since, BW501 if the file cannot be written.
    """
    measurement = model.__dict__.get(ATTRIBUTE)
    if not isinstance(measurement, Measurement):
        what = "nothing is being measured on this model"
        raise ArgumentError("BW201", what, suggestion="prepare(model, HybridGPTQConfig(...)) first")
    if not measurement.maxima:
        what = "nothing was measured: the model was not run"
        raise BitwrightError("BW401", what, suggestion="run the prepared model on some batches first")
    for handle in measurement.handles:
        handle.remove()
    measurement.handles, measurement.is_final = [], True
    record = {"format": FORMAT, "version": VERSION, "maxima": measurement.maxima}
    file = measurement.config.stats_file
    make_directory(file.parent)
    write_file(file, [(json.dumps(record, indent=2) + "\n").encode()])


def round_inputs(model: nn.Module, config: HybridGPTQConfig) -> nn.Module:
    """Let the quantized layers of ``model`` compute with fp8 inputs and fp8 weights from now on.

    What was measured on this very model is used, else what ``config.dump_stats_path`` keeps. Notices tell of layers
    that were never reached, which keep float inputs, and of weights that are no fp8 multiples as yet.

    Raises:
        ArgumentError: BW201 if the configuration is not one for quantizing, or the measurement was not finalized.
        BitwrightError: BW301 if nothing was measured, BW311 if the file cannot be read.
    """
    if config.mode == MEASURE:
        raise ArgumentError("BW201", "convert got a configuration of mode MEASURE", suggestion="mode QUANTIZE or AUTO")
    measurement = model.__dict__.get(ATTRIBUTE)
    if isinstance(measurement, Measurement) and not measurement.is_final:
        raise ArgumentError("BW201", "the measurement is not finished", suggestion="finalize_calibration(model)")
    maxima = measurement.maxima if isinstance(measurement, Measurement) else _read_maxima(config.stats_file)
    layers = _layers(model, config)
    missing = [name for name in layers if name not in maxima]
    if missing:
        message = f"layers that read nothing while it was measured keep float inputs: {list_names(missing)}"
        warnings.warn(Notice(message), stacklevel=3)
    reached = {name: layer for name, layer in layers.items() if name in maxima}
    inexact = [name for name, layer in reached.items() if not layer.has_fp8_weights()]
    if inexact:
        message = f"weights are rounded once more, to fp8, which fp8_aware=True makes exact: {list_names(inexact)}"
        warnings.warn(Notice(message), stacklevel=3)
    for name, layer in reached.items():
        layer.round_inputs(config.scale(maxima[name]))
    model.__dict__.pop(ATTRIBUTE, None)
    return model


def _layers(model: nn.Module, config: HybridGPTQConfig) -> dict[str, WeightOnlyLinear]:
    found = {name: layer for name, layer in model.named_modules() if isinstance(layer, WeightOnlyLinear)}
    if not found:
        what = "the model has no quantized layers"
        raise ArgumentError("BW201", what, suggestion="quantize it with GPTQConfig(fp8_aware=True), or load it, first")
    kept = {name: layer for name, layer in found.items() if config.concerns(name)}
    if not kept:
        raise ArgumentError("BW201", "allowlist and blocklist leave no layer", suggestion="one of " + ", ".join(found))
    return kept


def _listed(name: str, entries: Mapping[str, Any]) -> bool:
    types = {WeightOnlyLinear.__name__, nn.Linear.__name__}
    names = entries.get("names", ())
    return bool(types & set(entries.get("types", ()))) or any(
        pattern in (name, name.rpartition(".")[2]) or re.fullmatch(pattern, name) for pattern in names
    )


def _read_maxima(file: Path) -> dict[str, float]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except OSError:
        what = f"nothing was measured on this model, and there is no {file}"
        raise BitwrightError("BW301", what, suggestion="prepare, run and finalize_calibration first") from None
    except ValueError as error:
        raise _unreadable(file, str(error)) from None
    maxima = record.get("maxima") if isinstance(record, dict) and record.get("format") == FORMAT else None
    if not isinstance(maxima, dict) or record.get("version") != VERSION or not all(map(_is_maximum, maxima.values())):
        raise _unreadable(file, f"it holds no maxima of version {VERSION}")
    return {name: float(value) for name, value in maxima.items()}


def _is_maximum(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < math.inf  # type: ignore[operator]


def _unreadable(file: Path, why: str) -> BitwrightError:
    return BitwrightError("BW311", f"cannot read {file.name}: {why}", where=str(file), suggestion="measure again")
