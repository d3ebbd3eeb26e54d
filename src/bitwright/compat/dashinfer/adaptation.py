"""Which numbers a model runs in: from its own ``quantization_config``, or from a configuration that is given.

The switch is ``weight_only_quant``. A GPTQ checkpoint of 8 bits runs as A8W8 unless it is set, then as A16W8; one of 4
bits as A8W4 or A16W4. Columns that were reordered (``desc_act``) run in every mode.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bitwright.compat.dashinfer.instant_quant import InstantQuantConfig
from bitwright.core.errors import ArgumentError, BitwrightError, Notice
from bitwright.core.scheme import DYNAMIC_INT8, LayerScheme
from bitwright.formats import gptq
from bitwright.formats.checkpoint import Checkpoint, open_checkpoint
from bitwright.formats.parts import find_parts
from bitwright.models.hf import PreTrainedModel
from bitwright.models.loading import load_checkpoint
from bitwright.models.location import resolve_model
from bitwright.quantization.api import quantize
from bitwright.quantization.report import Report
from bitwright.quantization.session import quantize_module

__all__ = ["Adaptation", "adapt", "load", "serialize"]

CONFIG = "config.json"
# Layers whose inputs are what several devices have each a part of, by the last part of their names.
SPLIT_INPUTS = ("o_proj", "down_proj", "out_proj", "c_proj", "dense", "dense_4h_to_h", "fc2", "w2", "wo")


@dataclass(frozen=True, slots=True, kw_only=True)
class Adaptation:
    """What was chosen.

    Attributes:
        mode: ``A16W16`` (nothing is quantized), ``A16W8``, ``A8W8``, ``A16W4`` or ``A8W4``.
        schemes: the scheme of each quantized layer of a GPTQ checkpoint, activations included; empty for others.
        instant: for instant quantization, its configuration.
        notices: where the arguments disagree, which of them counts.
    """

    mode: str
    schemes: Mapping[str, LayerScheme]
    instant: InstantQuantConfig | None = None
    notices: tuple[str, ...] = ()


def adapt(
    model: str | Path,
    *,
    enable_quant: bool = True,
    weight_only_quant: bool | None = None,
    customized_quant_config: Mapping[str, Any] | None = None,
    tensor_parallel: int = 1,
) -> Adaptation:
    """Choose the numbers that ``model`` runs in. No weight is read.

    Args:
        model: a directory, an id on the hub, or ``demo:``.
        enable_quant: without it a float model runs as it is.
        weight_only_quant: leave activations in floating point; if not given, GPTQ models quantize them too.
        customized_quant_config: an instant quantization, for a float model.
        tensor_parallel: over how many devices the layers are split; groups must fit into the parts.

    Raises:
        BitwrightError: BW201 for an argument or a configuration, BW204 if groups do not fit a layer, BW311 for a model
            whose ``quantization_config`` is not adapted to; what opening a checkpoint raises.
    """
    for name, value in {"enable_quant": enable_quant, "weight_only_quant": weight_only_quant}.items():
        if value is not None and type(value) is not bool:
            raise ArgumentError("BW201", f"{name} is {value!r}", suggestion="True or False")
    if type(tensor_parallel) is not int or tensor_parallel < 1:
        raise ArgumentError("BW201", f"tensor_parallel is {tensor_parallel!r}", suggestion="a whole number, at least 1")
    instant = None
    if customized_quant_config is not None:
        instant = InstantQuantConfig.from_dict(customized_quant_config)
    checkpoint = open_checkpoint(resolve_model(model))
    if checkpoint.quantization is not None:
        if instant is not None:
            what = "the model is quantized already, so that customized_quant_config has nothing to quantize"
            raise ArgumentError("BW201", what, suggestion="leave it out, or give the float model")
        return _adapt_gptq(checkpoint, enable_quant, weight_only_quant, tensor_parallel)
    if not enable_quant:
        return Adaptation(mode="A16W16", schemes={})
    if instant is None:
        raise ArgumentError(
            "BW201",
            f"enable_quant is set, but {CONFIG} has no quantization_config",
            where=str(checkpoint.directory / CONFIG),
            suggestion='give customized_quant_config={"quant_method": "instant_quant", "weight_format": "int8"}',
        )
    return _adapt_instant(checkpoint, instant, weight_only_quant, tensor_parallel)


def _adapt_gptq(
    checkpoint: Checkpoint, enable_quant: bool, weight_only_quant: bool | None, tensor_parallel: int
) -> Adaptation:
    quantization, where = checkpoint.quantization or {}, str(checkpoint.directory / CONFIG)
    if not gptq.recognize(quantization):
        what = f"quantization_config has the quant_method {str(quantization.get('quant_method'))[:40]!r}"
        raise BitwrightError(
            "BW311", what, where=where, suggestion="only 'gptq' is adapted to; bitwright.load reads it"
        )
    if not enable_quant:
        what = "enable_quant is False, but the model is quantized"
        raise ArgumentError("BW201", what, where=where, suggestion="set enable_quant, or give the float model")
    layers = find_parts(checkpoint, gptq.FORMAT.layers(checkpoint))
    records = {name: layer.record for name, layer in layers.items()}
    widths = {record.scheme.weight.bits for record in records.values()}
    if not widths <= {4, 8}:
        what = f"the model has weights of {', '.join(map(str, sorted(widths)))} bits"
        raise BitwrightError("BW311", what, where=where, suggestion="only 4 and 8 bits are adapted to")
    activation = None if weight_only_quant else DYNAMIC_INT8
    schemes = {
        name: LayerScheme(weight=record.scheme.weight, activation=activation) for name, record in records.items()
    }
    sizes = {name: (record.shape[1], record.scheme.weight.group) for name, record in records.items()}
    _check_parts(sizes, tensor_parallel)
    common = int(quantization["bits"]) if quantization.get("bits") in widths else max(widths)
    mode = f"A{8 if activation else 16}W{common}"
    return Adaptation(mode=mode, schemes=schemes)


def _adapt_instant(
    checkpoint: Checkpoint, instant: InstantQuantConfig, weight_only_quant: bool | None, tensor_parallel: int
) -> Adaptation:
    """The configuration counts where it disagrees with the switch, and says so."""
    matrices = {
        name.removesuffix(".weight"): stored.entry.shape[1]
        for name, stored in checkpoint.tensors.items()
        if name.endswith(".weight") and len(stored.entry.shape) == 2 and any(map(str.isdecimal, name.split(".")))
    }
    group = instant.scheme.weight.group
    _check_parts({name: (columns, group) for name, columns in matrices.items()}, tensor_parallel)
    is_weight_only = instant.compute_method == "weight_only"
    notices: tuple[str, ...] = ()
    if weight_only_quant is not None and weight_only_quant != is_weight_only:
        does = "stay in floating point" if is_weight_only else "are quantized"
        notices = (
            f"weight_only_quant is {weight_only_quant}, but compute_method is {instant.compute_method!r}, "
            f"which counts: activations {does}",
        )
    return Adaptation(mode=instant.mode, schemes={}, instant=instant, notices=notices)


def _check_parts(sizes: Mapping[str, tuple[int, int | None]], tensor_parallel: int) -> None:
    """Refuse groups that a device would have only a part of; ``sizes``: input features and group of each layer."""
    for name, (columns, group) in sizes.items():
        is_split = name.rpartition(".")[2] in SPLIT_INPUTS
        part = columns // tensor_parallel if is_split else columns
        if group is not None and tensor_parallel > 1 and (part % group or (is_split and columns % tensor_parallel)):
            what = f"groups of {group} do not divide the {part} input features of {name}"
            why = (
                f"each of {tensor_parallel} devices has {'so many of the ' + str(columns) if is_split else 'them all'}"
            )
            raise BitwrightError("BW204", what, why=why, suggestion="a smaller group_size, or none")


def load(
    model: str | Path,
    *,
    enable_quant: bool = True,
    weight_only_quant: bool | None = None,
    customized_quant_config: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> PreTrainedModel:
    """The model, running in the numbers that :func:`adapt` chooses; its notices are warnings here.

    ``dtype``: of everything that is not quantized; as stored unless given.

    Raises:
        BitwrightError: as :func:`adapt`, and what :func:`bitwright.load` raises.
    """
    chosen = adapt(
        model,
        enable_quant=enable_quant,
        weight_only_quant=weight_only_quant,
        customized_quant_config=customized_quant_config,
    )
    _warn(chosen)
    checkpoint = open_checkpoint(resolve_model(model))
    if chosen.instant is not None:
        loaded = load_checkpoint(checkpoint, dtype=dtype)
        quantized = quantize_module(loaded, scheme=chosen.instant.scheme, group_fallback="pad", inplace=True)
        assert isinstance(quantized, PreTrainedModel)
        return quantized
    activations = {scheme.activation for scheme in chosen.schemes.values()}
    return load_checkpoint(checkpoint, dtype=dtype, activation=next(iter(activations), None))


def serialize(
    model: str | Path,
    model_output_dir: str | Path,
    *,
    enable_quant: bool = True,
    weight_only_quant: bool | None = None,
    customized_quant_config: Mapping[str, Any] | None = None,
) -> Report:
    """Write an instantly quantized model as a checkpoint of bitwright; embeddings, norms and the head stay float.

    Raises:
        BitwrightError: as :func:`adapt` and :func:`bitwright.quantize`; BW201 for a model that is not to be quantized,
            since its own directory is what :func:`load` takes.
    """
    chosen = adapt(
        model,
        enable_quant=enable_quant,
        weight_only_quant=weight_only_quant,
        customized_quant_config=customized_quant_config,
    )
    if chosen.instant is None:
        what = f"there is nothing to quantize: the model runs as {chosen.mode} as it is"
        raise ArgumentError("BW201", what, suggestion="load(...) takes its own directory")
    _warn(chosen)
    scheme = chosen.instant.scheme
    return quantize(model, model_output_dir, scheme=scheme, algorithm="rtn", format="native", group_fallback="pad")


def _warn(chosen: Adaptation) -> None:
    for notice in chosen.notices:
        warnings.warn(notice, Notice, stacklevel=3)
