"""The saved folder: ``quantized_model.pt``, a state dict with all that the model needs, and ``qconfig.json``."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.compat.neural_compressor.torch.quantization.weight_only_linear import WeightOnlyLinear
from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.scheme_names import parse
from bitwright.formats.checkpoint import Checkpoint, list_names
from bitwright.formats.storage import make_directory, write_file
from bitwright.models.blocks import set_module
from bitwright.models.hf import empty_model, read_config
from bitwright.models.names import shared_names

__all__ = ["RECORD", "VERSION", "WEIGHTS", "attach_save", "load", "save"]

WEIGHTS, RECORD = "quantized_model.pt", "qconfig.json"
OTHER_WEIGHTS = ("quantized_weight.pt",)  # what newer versions of the document call it
FORMAT, VERSION = "bitwright.neural_compressor", 1


def save(model: nn.Module, directory: str | Path = "./saved_results") -> None:
    """Write a converted model to ``directory``; also its ``save`` method.

    ``quantized_model.pt`` is a state dict of tensors alone: those of :meth:`WeightOnlyLinear.compress`, and every other
    parameter and buffer of the model under its own name. ``qconfig.json`` holds the configuration, what each layer is
    stored in, and, for models of transformers, their own configuration. Equal models give equal bytes.

    Raises:
        BitwrightError: BW201 if the model was not converted, BW501 if a file cannot be written.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, WeightOnlyLinear)}
    if not layers:
        raise ArgumentError("BW201", "the model has no quantized layers", suggestion="convert it before saving it")
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if not any(name.startswith(f"{layer}.") for layer in _parents(name) & set(layers)):
            tensors[name] = tensor.detach()
    for name, layer in layers.items():
        bias = {} if layer.bias is None else {"bias": layer.bias.detach()}
        tensors |= {f"{name}.{field}": value for field, value in (layer.compress() | bias).items()}
    torch.save(tensors, buffer := io.BytesIO())
    target = Path(directory)
    make_directory(target)
    write_file(target / WEIGHTS, [buffer.getbuffer()])
    record = json.dumps(_record(model, layers), indent=2, default=str) + "\n"
    write_file(target / RECORD, [record.encode()])


def load(directory: str | Path, original_model: nn.Module | None = None, device: str = "cpu") -> nn.Module:
    """Read what :func:`save` wrote.

    ``original_model`` is changed in place and returned: only its structure counts, all numbers come from the folder, so
    that its parameters may be of any value or on the meta device. It can be left out for causal language models of
    transformers.

    Raises:
        BitwrightError: BW301 or BW311 for a folder of another kind or version, BW305 for a file that holds anything but
            tensors or is cut off, BW303 naming tensors that are missing or have no place, BW304 naming one of another
            shape.
        ArgumentError: BW201 if an original model is needed.
    """
    folder = Path(directory)
    record = _read_record(folder)
    tensors = _read_tensors(folder)
    model = _rebuild(folder, record, tensors) if original_model is None else original_model
    rest, layers = dict(tensors), record["layers"]
    built: dict[str, WeightOnlyLinear] = {}
    for name, entry in layers.items():
        own = {key.removeprefix(f"{name}."): rest.pop(key) for key in list(rest) if key.startswith(f"{name}.")}
        shape = (int(entry["shape"][0]), int(entry["shape"][1]))
        scheme, algorithm = parse(entry["scheme"]), str(entry["algorithm"])
        built[name] = WeightOnlyLinear.from_compressed(own, scheme, shape, algorithm=algorithm, name=name)
    _check_places(model, folder, built, rest)
    shared = shared_names(model)
    for name, layer in built.items():
        set_module(model, name, layer)
    model.load_state_dict(rest, strict=False, assign=True)
    for second, first in shared.items():
        if second in rest and first in rest:
            parent, _, leaf = second.rpartition(".")
            model.get_submodule(parent).register_parameter(leaf, model.get_parameter(first))
    model.__dict__["qconfig"] = record["quantization"]
    attach_save(model)
    return model.to(device).eval()


def attach_save(model: nn.Module) -> None:
    """Give ``model`` its ``save`` method."""
    model.__dict__["save"] = MethodType(save, model)


def _parents(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(1, len(parts))}


def _record(model: nn.Module, layers: dict[str, WeightOnlyLinear]) -> dict[str, Any]:
    config = getattr(model, "config", None)
    fields = config.to_dict() if config is not None and hasattr(config, "to_dict") else None
    if fields is not None and isinstance(dtype := getattr(model, "dtype", None), torch.dtype):
        fields["dtype"] = str(dtype).removeprefix("torch.")
    records = {
        name: {
            "algorithm": layer.algorithm,
            "scheme": layer.scheme.name,
            "shape": [layer.out_features, layer.in_features],
        }
        for name, layer in layers.items()
    }
    return {
        "format": FORMAT,
        "version": VERSION,
        "quantization": model.__dict__.get("qconfig"),
        "layers": records,
        "model": {"class": type(model).__name__, "config": fields},
    }


def _read_record(folder: Path) -> dict[str, Any]:
    path = folder / RECORD
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        suggestion = "a folder that model.save() wrote"
        raise BitwrightError("BW301", f"{folder} has no {RECORD}", where=str(folder), suggestion=suggestion) from None
    except ValueError as error:
        raise _damaged(path, f"it is not JSON: {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise _damaged(path, "it is not of this format")
    if record.get("version") != VERSION:
        what = f"it is of version {str(record.get('version'))[:40]}; this bitwright reads version {VERSION}"
        raise _damaged(path, what)
    layers = record.get("layers")
    if not isinstance(layers, dict) or not layers or not all(_is_layer(entry) for entry in layers.values()):
        raise _damaged(path, "its records of layers are not algorithms, schemes and shapes")
    return record


def _is_layer(entry: object) -> bool:
    if not isinstance(entry, dict) or set(entry) != {"algorithm", "scheme", "shape"}:
        return False
    shape = entry["shape"]
    is_shape = isinstance(shape, list) and len(shape) == 2 and all(type(size) is int and size > 0 for size in shape)
    return is_shape and isinstance(entry["scheme"], str) and isinstance(entry["algorithm"], str)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    path = next((folder / name for name in (WEIGHTS, *OTHER_WEIGHTS) if (folder / name).is_file()), None)
    if path is None:
        raise BitwrightError(
            "BW301", f"{folder} has no {WEIGHTS}", where=str(folder), suggestion="save the model again"
        )
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # refused instructions and damaged archives surface as any kind of exception
        raise BitwrightError(
            "BW305",
            f"{path.name} is cut off, damaged, or holds something other than tensors",
            where=str(path),
            why=f"{type(error).__name__}: {str(error).partition(chr(10))[0][:200]}",
            suggestion="save the model again; nothing in the file was run",
        ) from None
    if not isinstance(tensors, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors.items()
    ):
        what = f"{path.name} is not a dictionary of tensors by name"
        raise BitwrightError("BW305", what, where=str(path), suggestion="save the model again")
    return tensors


def _rebuild(folder: Path, record: dict[str, Any], tensors: dict[str, Tensor]) -> nn.Module:
    """The empty model that the folder describes."""
    described = record.get("model")
    described = described if isinstance(described, dict) else {}
    fields = described.get("config")
    model: nn.Module | None = None
    if isinstance(fields, dict):
        names: Any = tensors
        try:
            model = empty_model(read_config(Checkpoint(folder, dict(fields), names, {}, {})))
        except BitwrightError as error:
            if error.code != "BW306":  # a model that is known, but not built so
                raise
    if model is None or type(model).__name__ != described.get("class"):
        what = f"{folder} does not say how to build the model"
        why = "only causal language models of transformers are rebuilt from their configuration"
        raise ArgumentError("BW201", what, why=why, suggestion="give original_model=")
    return model


def _check_places(model: nn.Module, folder: Path, built: dict[str, WeightOnlyLinear], rest: dict[str, Tensor]) -> None:
    """Every tensor has a place of its shape, and every place its tensor."""
    modules = dict(model.named_modules())
    strange = [name for name in built if name not in modules]
    expected = {name: tensor for name, tensor in model.state_dict().items() if not _parents(name) & set(built)}
    missing = [name for name in expected if name not in rest]
    strange += [name for name in rest if name not in expected]
    for names, problem in ((missing, "are missing from the folder"), (strange, "have no place in the model")):
        if names:
            what = f"{len(names)} tensors or layers {problem}: {list_names(names)}"
            raise BitwrightError("BW303", what, where=str(folder), suggestion="give the original model of this folder")
    for name, tensor in expected.items():
        if tensor.shape != rest[name].shape:
            what = f"{name} is {list(rest[name].shape)}; the model calls for {list(tensor.shape)}"
            raise BitwrightError("BW304", what, where=str(folder), suggestion="give the original model of this folder")


def _damaged(path: Path, what: str) -> BitwrightError:
    return BitwrightError("BW311", f"cannot read {path.name}: {what}", where=str(path), suggestion="save it again")
