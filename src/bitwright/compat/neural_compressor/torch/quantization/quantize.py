"""The document's main functions: prepare a model, run it on data, convert it; or all of it at once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import nn

from bitwright.compat.neural_compressor.torch.empty_model import BlockLoader, attach_source, source_of
from bitwright.compat.neural_compressor.torch.quantization.composition import ComposedConfig, read_config
from bitwright.compat.neural_compressor.torch.quantization.config import WeightOnlyConfig
from bitwright.compat.neural_compressor.torch.quantization.conversion import assign, quantize_layers
from bitwright.compat.neural_compressor.torch.quantization.fp8_inputs import (
    HybridGPTQConfig,
    round_inputs,
    start_measuring,
)
from bitwright.compat.neural_compressor.torch.quantization.preparation import Preparation, preparation_of
from bitwright.compat.neural_compressor.torch.quantization.saving import attach_save
from bitwright.compat.neural_compressor.torch.quantization.teq_training import insert_trainable_scales
from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.models.location import resolve_model

__all__ = ["Configuration", "convert", "prepare", "quantize"]

Configuration = WeightOnlyConfig | ComposedConfig | HybridGPTQConfig | Mapping[str, Any]


def prepare(
    model: nn.Module, quant_config: Configuration, inplace: bool = True, example_inputs: Any = None
) -> nn.Module:
    """Make ``model`` (or a copy of it, unless ``inplace``) note every batch that it is run on, for :func:`convert`.

    It stays the model that it is and computes what it computed. The exception is TEQ with ``example_inputs`` (a tensor,
    a tuple of arguments or a dictionary of keywords): then the scales are parameters of the model, the only ones that
    are trained, and it computes with rounded weights. If no training reaches them, :func:`convert` trains them itself.
    Other algorithms do not need ``example_inputs``, because nothing is traced. With a :class:`HybridGPTQConfig` a
    quantized model notes how large the inputs of its layers are.

    Raises:
        ValueError, TypeError: for a configuration that is wrong in itself.
        BitwrightError: for one that does not fit the model. Nothing is changed then.
    """
    if isinstance(quant_config, HybridGPTQConfig):
        return start_measuring(model if inplace else copy.deepcopy(model), quant_config)
    config = read_config(quant_config)
    if preparation_of(model) is not None:
        raise ArgumentError("BW201", "the model is prepared already", suggestion="convert it, or prepare it afresh")
    assign(model, config)
    target = model if inplace else copy.deepcopy(model)
    preparation = Preparation(config, loader=_open_weights(target, config))
    if example_inputs is not None and preparation.loader is None:
        insert = partial(insert_trainable_scales, example_inputs=example_inputs)
        preparation.training = preparation.in_blocks(target, insert)
    preparation.attach(target)
    return target


def convert(model: nn.Module, quant_config: Configuration | None = None, inplace: bool = True) -> nn.Module:
    """Quantize a prepared model with the batches that it saw; it gets a ``save`` method.

    A model that was not prepared is converted at once if ``quant_config`` is given and needs no calibration. With a
    :class:`HybridGPTQConfig` a quantized and measured model gets fp8 inputs.

    Raises:
        ArgumentError: BW201 for a model that was not prepared, or with another ``quant_config`` than is given here.
        BitwrightError: BW401 if calibration is needed and the model was never run; BW309 or BW601 for weights or
            activations that are not finite. The model is still prepared then, and can be run and converted again.
    """
    target = model if inplace else copy.deepcopy(model)
    if isinstance(quant_config, HybridGPTQConfig):
        return round_inputs(target, quant_config)
    if preparation_of(target) is None:
        if quant_config is None:
            what = "the model was not prepared"
            raise ArgumentError(
                "BW201", what, suggestion="prepare(model, quant_config), or give convert a quant_config"
            )
        prepare(target, quant_config)
    preparation = preparation_of(target)
    assert preparation is not None
    if quant_config is not None and read_config(quant_config).to_dict() != preparation.config.to_dict():
        what = "the model was prepared with another quant_config than convert is given"
        raise ArgumentError("BW201", what, suggestion="leave it out, or prepare the model with it")
    source = preparation.loader.source if preparation.loader is not None else None
    training, multipliers = preparation.training, None
    with preparation.converting():
        if training is not None:
            training.remove()
            multipliers = training.fold() if training.has_begun else None
            preparation.training = None
        samples = preparation.samples()
        work = partial(quantize_layers, target, batches=samples, source=source, multipliers=multipliers)
        preparation.in_blocks(target, work)
    preparation.detach(target)
    target.__dict__["qconfig"] = preparation.config.to_dict()
    attach_save(target)
    return target


def quantize(
    model: nn.Module,
    quant_config: Configuration,
    run_fn: Callable[..., object] | None = None,
    run_args: Any = None,
    inplace: bool = True,
    example_inputs: Any = None,
) -> nn.Module:
    """:func:`prepare`, ``run_fn(model, *run_args)`` if there is one, and :func:`convert`."""
    prepared = prepare(model, quant_config, inplace=inplace, example_inputs=example_inputs)
    if run_fn is not None:
        arguments = () if run_args is None else run_args if isinstance(run_args, tuple | list) else (run_args,)
        run_fn(prepared, *arguments)
    return convert(prepared)


def _open_weights(model: nn.Module, config: ComposedConfig) -> BlockLoader | None:
    """Bring the weights of an empty model into memory: at once, or, layer by layer, when they are needed.

    Raises:
        BitwrightError: BW303 for an empty model of which nobody says where its weights are.
    """
    members = [member.config for member in config.members]
    source = source_of(model)
    if source is None and any(parameter.is_meta for parameter in model.parameters()):
        paths = [path for path in (getattr(each, "model_path", "") for each in members) if path]
        if not paths:
            what = "the model is empty: its weights are on the meta device"
            raise BitwrightError("BW303", what, suggestion="give model_path, or make the model by load_empty_model")
        source = source_of(attach_source(resolve_model(paths[0]), model))
    if source is None:
        return None
    if any(getattr(each, "use_layer_wise", False) for each in members):
        return BlockLoader(source)
    source.load(source.shapes())
    return None
