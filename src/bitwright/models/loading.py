"""A checkpoint as a running model: quantized layers stay packed, everything else is read one tensor at a time."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import QuantScheme
from bitwright.formats.checkpoint import Checkpoint, list_names, open_checkpoint
from bitwright.formats.directory import find_file, read_object
from bitwright.formats.parts import PartReader, StoredLayer, find_parts
from bitwright.formats.stored import check_finite, read_checked
from bitwright.formats.table import find_format
from bitwright.models.blocks import is_linear, linear_shape, set_module
from bitwright.models.hf import empty_model, load_tokenizer, read_config
from bitwright.models.location import resolve_model
from bitwright.models.names import match_names
from bitwright.models.quantized import QuantizedLinear
from bitwright.models.saving import attach_saving
from bitwright.models.tying import untie_stored

if TYPE_CHECKING:
    from bitwright.models.hf import PreTrainedModel, Tokenizer

__all__ = [
    "Contents",
    "build_layer",
    "check_vocabulary",
    "load",
    "load_checkpoint",
    "load_with_tokenizer",
    "match_contents",
    "read_generation_settings",
    "read_layer",
    "read_parameter",
]

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
GENERATION_CONFIG = "generation_config.json"
GENERATION_LIMIT = 1 << 20


def load(model: str | Path, *, dtype: torch.dtype | None = None, threads: int | None = None) -> PreTrainedModel:
    """A transformers causal language model in evaluation mode, its quantized layers running from packed codes.

    Args:
        model: ``demo:``, a directory, or an id on the hub; quantized in any format that bitwright reads, or float.
        dtype: the dtype of everything that is not quantized, and so of the activations; as stored unless given.
        threads: how many threads torch uses from now on, in the whole process.

    Raises:
        BitwrightError: BW201 for an argument; BW301, BW504 if there is no such model; BW302 to BW312 for what is wrong
            with its files.

    Example:
        >>> model = bitwright.load("demo:")
        >>> model(input_ids=torch.tensor([[1, 2, 3]])).logits.shape
        torch.Size([1, 3, 2048])
    """
    if dtype is not None and dtype not in FLOAT_DTYPES:
        accepted = ", ".join(str(accepted) for accepted in FLOAT_DTYPES)
        raise ArgumentError("BW201", f"dtype is {dtype!r}", suggestion=f"one of {accepted}")
    if threads is not None:
        if type(threads) is not int or threads < 1:
            raise ArgumentError("BW201", f"threads is {threads!r}", suggestion="a whole number, at least 1")
        torch.set_num_threads(threads)
    directory = resolve_model(model)
    loaded = load_checkpoint(open_checkpoint(directory), dtype=dtype)
    if find_file(directory, "tokenizer.json") is not None:
        check_vocabulary(loaded, load_tokenizer(directory))
    return loaded


def load_with_tokenizer(
    model: str | Path, *, dtype: torch.dtype | None = None, threads: int | None = None
) -> tuple[PreTrainedModel, Tokenizer]:
    """The model, as :func:`load` gives it, and its tokenizer.

    Raises:
        BitwrightError: as :func:`load`; BW312 if there is no tokenizer.
    """
    directory = resolve_model(model)
    loaded, tokenizer = load(directory, dtype=dtype, threads=threads), load_tokenizer(directory)
    check_vocabulary(loaded, tokenizer)
    return loaded, tokenizer


def check_vocabulary(model: Any, tokenizer: Tokenizer) -> None:
    """Raises BW312 if the tokenizer has a token without an embedding; spare embeddings are common and harmless."""
    embedding = model.get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", None)
    tokens = max(tokenizer.get_vocab().values(), default=-1) + 1
    if isinstance(rows, int) and tokens > rows:
        raise BitwrightError(
            "BW312",
            f"the tokenizer has {tokens} tokens, but the model has embeddings for {rows}",
            where=str(tokenizer.name_or_path),
            suggestion="restore the tokenizer files that belong to these weights",
        )


def load_checkpoint(
    checkpoint: Checkpoint, *, dtype: torch.dtype | None = None, activation: QuantScheme | None = None
) -> PreTrainedModel:
    """The model of an open checkpoint; see :func:`load`.

    At no time is more in memory than the model so far, and one tensor. With ``activation``, the inputs of all quantized
    layers are quantized so while the model runs, whatever the checkpoint says.

    Raises:
        BitwrightError: as :func:`load`; BW202 if ``activation`` cannot go with the weights.
    """
    quantization = checkpoint.quantization
    layout = None if quantization is None else find_format(quantization)  # before the model, whose making takes seconds
    config = read_config(checkpoint)
    if dtype is not None:
        config.dtype = dtype
    model = empty_model(config)
    contents = match_contents(model, checkpoint, activation=activation)
    _fill(model, checkpoint, contents.matched)
    for name in contents.layers:
        set_module(model, name, build_layer(contents, name, model.get_submodule(name).bias))
    fields = read_generation_settings(checkpoint.directory)
    if fields is not None:
        _take_generation_settings(model, checkpoint.directory, fields)
    attach_saving(model, None if layout is None else layout.name)
    model.name_or_path = model.config.name_or_path = str(checkpoint.directory)
    return model


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """Which tensors of a checkpoint fill which places of a model.

    Attributes:
        reader: of the numbers of the quantized layers, if there are any.
        layers: each quantized layer, by its name in the model.
        matched: of each other parameter or buffer, by its name in the model, the name in the files.
    """

    checkpoint: Checkpoint
    reader: PartReader | None
    layers: Mapping[str, StoredLayer]
    matched: Mapping[str, str]


def match_contents(model: nn.Module, checkpoint: Checkpoint, *, activation: QuantScheme | None = None) -> Contents:
    """Find the tensors of a model whose parameters are on the meta device; its quantized layers lose theirs.

    Raises:
        BitwrightError: as :func:`load_checkpoint`.
    """
    quantization = checkpoint.quantization
    layout = None if quantization is None else find_format(quantization)
    layers: dict[str, StoredLayer] = {}
    if layout is not None:
        records = layout.layers(checkpoint)
        if activation is not None:
            records = {
                name: replace(record, scheme=replace(record.scheme, activation=activation))
                for name, record in records.items()
            }
        layers = _place_layers(model, checkpoint, find_parts(checkpoint, records))
    stored = {layer.name for layer in layers.values()}
    taken = {name for layer in stored for name in _layer_tensors(checkpoint, layer)}
    taken |= _zero_biases(model, checkpoint, layers)
    available = {name: None for name in checkpoint.tensors if name not in taken}
    untie_stored(model, checkpoint, available)
    reader = None if layout is None else PartReader(checkpoint, layout)
    return Contents(checkpoint=checkpoint, reader=reader, layers=layers, matched=match_names(model, available))


class _Vacancy(nn.Module):
    """Where a quantized layer will be: its bias, which is an ordinary tensor, and no weight."""

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias


def _place_layers(model: nn.Module, checkpoint: Checkpoint, found: Mapping[str, StoredLayer]) -> dict[str, StoredLayer]:
    """Empty the places of the quantized layers, and give them by their names in the model.

    The names that were found may carry the name of the base model as a prefix or lack it.
    """
    modules = {name: module for name, module in model.named_modules() if is_linear(module)}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    layers: dict[str, StoredLayer] = {}
    homeless = []
    for known, layer in found.items():
        spellings = (known, prefix + known, known.removeprefix(prefix))
        name = next((spelling for spelling in spellings if spelling in modules and spelling not in layers), None)
        if name is None:
            homeless.append(layer.name)
        else:
            layers[name] = layer
    if homeless:
        what = f"{len(homeless)} quantized layers have no place in the model: {list_names(homeless)}"
        raise BitwrightError(
            "BW303", what, where=str(checkpoint.directory), suggestion="restore the config.json of these weights"
        )
    for name, layer in layers.items():
        wanted, shape = linear_shape(modules[name]), layer.record.shape
        if shape != wanted:
            title = f"{name}, rows of {layer.name}," if layer.rows else layer.name
            raise _wrong_shape(checkpoint, title, shape, wanted, model)
        bias = modules[name].bias
        set_module(model, name, _Vacancy(bias if isinstance(bias, nn.Parameter) else None))
    return layers


def _zero_biases(model: nn.Module, checkpoint: Checkpoint, layers: Mapping[str, StoredLayer]) -> set[str]:
    """The biases that the files have where the model has none, if all zero: old writers of GPTQ give them to all."""
    found = set()
    for name, layer in layers.items():
        if model.get_submodule(name).bias is None and layer.bias in checkpoint.tensors:
            shape = layer.record.shape[:1]
            values = read_checked(checkpoint, layer.bias, FLOAT_DTYPES, shape, field="the output features")
            if not bool(values.any()):
                found.add(layer.bias)
    return found


def _layer_tensors(checkpoint: Checkpoint, stored: str) -> Iterable[str]:
    """The names of the tensors that a format keeps of one layer."""
    return (name for name in checkpoint.tensors if name.startswith(stored + ".") and name != stored + ".bias")


def build_layer(contents: Contents, name: str, bias: object) -> QuantizedLinear:
    """One quantized layer, by its name in the model; its unpacked codes are gone when this returns."""
    tensor, input_scale = read_layer(contents, name)
    scheme = contents.layers[name].whole.scheme
    built = QuantizedLinear.build(tensor, bias if isinstance(bias, Tensor) else None, scheme, input_scale=input_scale)
    built.eval()
    return built


def read_layer(contents: Contents, name: str) -> tuple[QuantizedTensor, Tensor | None]:
    """The weight of a quantized layer, by its name in the model, and what its inputs are multiplied by."""
    checkpoint, layer = contents.checkpoint, contents.layers[name]
    assert contents.reader is not None
    tensor, scale = contents.reader.read(layer), f"{layer.name}.input_scale"
    if scale not in checkpoint.tensors:  # the formats that have none refuse the name when they list the layers
        return tensor, None
    input_scale = read_checked(checkpoint, scale, (torch.float32,), tensor.shape[1:])
    check_finite(scale, input_scale)
    return tensor, input_scale


def _fill(model: nn.Module, checkpoint: Checkpoint, matched: Mapping[str, str]) -> None:
    """Read each matched tensor into its parameter, wherever that is tied to, or its buffer."""
    places: dict[nn.Parameter, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            places.setdefault(parameter, []).append((module, leaf))
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for name, stored in matched.items():
        if name in buffers:
            holder, _, leaf = name.rpartition(".")
            model.get_submodule(holder)._buffers[leaf] = read_parameter(model, checkpoint, stored, buffers[name])
            continue
        filled = nn.Parameter(read_parameter(model, checkpoint, stored, parameters[name]), requires_grad=False)
        for module, leaf in places[parameters[name]]:
            module._parameters[leaf] = filled


def read_parameter(model: nn.Module, checkpoint: Checkpoint, stored: str, like: Tensor) -> Tensor:
    """One tensor from the files, of the shape of ``like`` and cast to its dtype."""
    wanted, found = tuple(like.shape), checkpoint.stored(stored).entry.shape
    if found != wanted:
        raise _wrong_shape(checkpoint, stored, found, wanted, model)
    dtypes = (*FLOAT_DTYPES, torch.float64) if like.is_floating_point() else (like.dtype,)
    return read_checked(checkpoint, stored, dtypes, wanted, field="config.json").to(like.dtype)


def _wrong_shape(
    checkpoint: Checkpoint, name: str, found: tuple[int, ...], wanted: tuple[int, ...], model: nn.Module
) -> BitwrightError:
    """BW304, with the fields of the configuration that have the numbers called for."""
    sizes = {size for size, other in zip_longest(wanted, found) if size != other and size is not None}
    config = getattr(model, "config", None)
    fields = getattr(config, "__dict__", {})
    named = [f"{field} = {value}" for field, value in fields.items() if type(value) is int and value in sizes]
    head = getattr(config, "head_dim", None)
    for field in ("num_attention_heads", "num_key_value_heads"):
        if isinstance(head, int) and isinstance(fields.get(field), int) and fields[field] * head in sizes:
            named.append(f"{field} x head_dim = {fields[field] * head}")
    return BitwrightError(
        "BW304",
        f"{name} has the shape {list(found)}; config.json calls for {list(wanted)}",
        where=str(checkpoint.directory / checkpoint.stored(name).file) if name in checkpoint.tensors else name,
        why=f"config.json says {', '.join(named)}" if named else "",
        suggestion="restore the config.json that belongs to the weights",
    )


def read_generation_settings(directory: Path) -> dict[str, Any] | None:
    """The fields of ``generation_config.json``, where there is one.

    Raises:
        BitwrightError: BW307 if it cannot be read.
    """
    path = find_file(directory, GENERATION_CONFIG)
    return None if path is None else read_object(path, code="BW307", limit=GENERATION_LIMIT)


def _take_generation_settings(model: PreTrainedModel, directory: Path, fields: dict[str, Any]) -> None:
    """Which tokens end a text, above all."""
    settings = model.generation_config
    if settings is None:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about settings that do not go together; they are not used here
            model.generation_config = type(settings).from_dict(fields)
    except Exception as error:  # whatever a field of the wrong kind makes transformers raise
        what, where = f"it cannot be read: {type(error).__name__}: {error}", str(directory / GENERATION_CONFIG)
        raise BitwrightError("BW307", what, where=where, suggestion="fetch this file again") from None
