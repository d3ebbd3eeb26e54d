"""A model with quantized layers as a checkpoint again: what ``save_pretrained`` does for the models of bitwright."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.formats import native
from bitwright.formats.checkpoint import CONFIG, INDEX, SINGLE, list_names
from bitwright.formats.checksums import CHECKSUMS, serialize_checksums
from bitwright.formats.records import Format, LayerRecord
from bitwright.formats.safetensors_file import serialize
from bitwright.formats.storage import make_directory, remove_file, write_file
from bitwright.formats.table import get_format
from bitwright.models.blocks import is_linear, output_head
from bitwright.models.names import shared_names, state_names
from bitwright.models.quantized import QuantizedLinear

__all__ = ["attach_saving", "save"]

SHARD_BYTES = 2 << 30
GENERATION_CONFIG = "generation_config.json"
FORMAT_FIELD = "_bitwright_format"


def attach_saving(model: nn.Module, format: str | None = None) -> None:
    """Let ``model.save_pretrained(directory)`` be :func:`save`, in ``format`` unless that cannot store the model.

    What transformers itself would write are the tensors of the kernels, which nothing could read again.
    """
    is_quantized = any(isinstance(module, QuantizedLinear) for module in model.modules())
    if is_quantized and callable(getattr(model, "save_pretrained", None)):
        model.__dict__[FORMAT_FIELD] = format
        model.__dict__["save_pretrained"] = MethodType(save, model)


def save(model: nn.Module, save_directory: str | Path, *, format: str | None = None) -> None:
    """Write a model of transformers whose linear layers are quantized to a directory that :func:`bitwright.load` reads.

    Args:
        format: of the checkpoint; unless given, the one that the model was loaded from, or native where that cannot
            store it.

    Raises:
        BitwrightError: BW201 if the model has no quantized layers or no configuration, BW203 if the directory holds
            weights already, BW205 if the format cannot store the model, BW501 if a file cannot be written, of which
            nothing is left then.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    config = getattr(model, "config", None)
    if not layers or not hasattr(config, "to_dict"):
        what = "only models of transformers with quantized layers are saved so"
        raise ArgumentError("BW201", what, suggestion="quantize the model first: bitwright.quantize_module")
    directory = Path(save_directory)
    taken = [name for name in (SINGLE, INDEX, CONFIG) if (directory / name).exists()]
    if taken:
        raise BitwrightError(
            "BW203", f"{directory} holds a model already: {list_names(taken)}", suggestion="choose another directory"
        )
    records, ignored = _records(layers), _ignored(model, layers)
    layout = _choose_format(model, layers, records, ignored, format)
    make_directory(directory)
    files = {CONFIG: _json(_config(model, config, layers) | {"quantization_config": layout.config(records, ignored)})}
    settings: Any = getattr(model, "generation_config", None)
    if hasattr(settings, "to_json_string"):
        files[GENERATION_CONFIG] = [(settings.to_json_string() + "\n").encode()]
    with _all_or_nothing(directory) as hashes:
        weight_map = _write_shards(model, layers, layout, directory, hashes)
        total = sum((directory / name).stat().st_size for name in hashes)
        files[INDEX] = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
        for name, chunks in files.items():
            _write(directory, name, chunks, hashes)
        _write(directory, CHECKSUMS, [serialize_checksums(hashes)], hashes)


@contextlib.contextmanager
def _all_or_nothing(directory: Path) -> Iterator[dict[str, str]]:
    """The sha256 of each file that is written, by its name; if anything fails, they are removed."""
    hashes: dict[str, str] = {}
    try:
        yield hashes
    except BaseException:
        for name in hashes:
            with contextlib.suppress(BitwrightError):
                remove_file(directory / name)
        raise


def _write(directory: Path, name: str, chunks: Iterable[bytes | memoryview], hashes: dict[str, str]) -> None:
    hashes[name] = ""  # from now on the file may be there
    hashes[name] = write_file(directory / name, chunks)


def _choose_format(
    model: nn.Module,
    layers: Mapping[str, QuantizedLinear],
    records: Mapping[str, LayerRecord],
    ignored: list[str],
    wanted: str | None,
) -> Format:
    name = wanted or model.__dict__.get(FORMAT_FIELD) or native.FORMAT.name
    layout = get_format(name)
    reasons = [layout.refuse(record.scheme, record.shape) for record in records.values()]
    reasons.append(layout.refuse_together(records, ignored))
    has_scales = any(layer.input_scale is not None for layer in layers.values())
    reasons.append("it has no scales of inputs" if has_scales and layout is not native.FORMAT else None)
    reason = next((reason for reason in reasons if reason is not None), None)
    if reason is None:
        return layout
    if wanted is None:
        return native.FORMAT
    what = f"the {name} format cannot store this model: {reason}"
    raise BitwrightError("BW205", what, suggestion="format='native' stores every model")


def _write_shards(
    model: nn.Module, layers: Mapping[str, QuantizedLinear], layout: Format, directory: Path, hashes: dict[str, str]
) -> dict[str, str]:
    """Write all tensors; return which file each tensor is in."""
    groups = list(_groups(model, layers))
    weight_map: dict[str, str] = {}
    state = model.state_dict(keep_vars=True)
    for number, names in enumerate(groups):
        file = f"model-{number + 1:05d}-of-{len(groups):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            if name in layers:
                tensors |= _layer_tensors(name, layers[name], layout)
            else:
                tensors[name] = state[name].detach()
        _write(directory, file, serialize(tensors), hashes)
        weight_map |= dict.fromkeys(tensors, file)
    return weight_map


def _layer_tensors(name: str, layer: QuantizedLinear, layout: Format) -> dict[str, Tensor]:
    tensors = dict(layout.encode(name, layer.unpack(), layer.scheme))
    if layer.bias is not None:
        tensors[f"{name}.bias"] = layer.bias.detach()
    if layer.input_scale is not None:
        tensors[f"{name}.input_scale"] = layer.input_scale
    return tensors


def _groups(model: nn.Module, layers: Mapping[str, QuantizedLinear]) -> Iterator[list[str]]:
    """The names of layers, and of the tensors outside them, that go to one file."""
    second = shared_names(model)
    outside = [name for name in state_names(model) if name not in second and not _is_inside(name, layers)]
    state = model.state_dict(keep_vars=True)
    sizes = {name: state[name].nbytes for name in outside}
    sizes |= {name: layer.resident_bytes() for name, layer in layers.items()}
    group: list[str] = []
    filled = 0
    for name, size in sizes.items():
        if group and filled + size > SHARD_BYTES:
            yield group
            group, filled = [], 0
        group.append(name)
        filled += size
    yield group


def _is_inside(name: str, layers: Mapping[str, QuantizedLinear]) -> bool:
    return name.rpartition(".")[0] in layers


def _records(layers: Mapping[str, QuantizedLinear]) -> dict[str, LayerRecord]:
    found = {}
    for name, layer in layers.items():
        reordered = layer.unpack().group_index is not None
        found[name] = LayerRecord(layer.scheme, (layer.out_features, layer.in_features), reordered)
    return found


def _ignored(model: nn.Module, layers: Mapping[str, QuantizedLinear]) -> list[str]:
    """Linear layers in floating point; a tied head counts, since readers that go by layer type would replace it."""
    return [name for name, module in model.named_modules() if name and is_linear(module) and name not in layers]


def _config(model: nn.Module, config: Any, layers: Mapping[str, QuantizedLinear]) -> dict[str, Any]:
    fields: dict[str, Any] = {key: value for key, value in config.to_dict().items() if key != "auto_map"}
    if isinstance(dtype := getattr(model, "dtype", None), torch.dtype):
        fields["dtype"] = str(dtype).removeprefix("torch.")
    fields["architectures"] = [type(model).__name__]
    head = output_head(model)
    if fields.get("tie_word_embeddings") and (head is None or head[0] in layers):
        fields["tie_word_embeddings"] = False
    return fields


def _json(value: Any) -> list[bytes]:
    return [(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=str) + "\n").encode()]
