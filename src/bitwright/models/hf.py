"""Everything taken from transformers, in one module, so that its changes are mended in one place.

It is imported when something of it is first used: that takes seconds, and the engine can run most models without it.
"""

from __future__ import annotations

import difflib
import importlib
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import Checkpoint
from bitwright.formats.directory import locate_file
from bitwright.models.coded_tokenizers import Description, describe_coded

__all__ = [
    "VERSION", "Cache", "CacheLayerMixin", "PreTrainedModel", "PretrainedConfig", "Tokenizer", "context_length",
    "empty_model", "has_tokenizer", "load_tokenizer", "read_config",
]  # fmt: skip

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel
    from transformers import PreTrainedTokenizerBase as Tokenizer
    from transformers.cache_utils import Cache, CacheLayerMixin

    VERSION: str

# Where the names of transformers that others import from here live: module, and what it is called there.
SOURCES = {
    "VERSION": ("transformers", "__version__"),
    "Cache": ("transformers.cache_utils", "Cache"),
    "CacheLayerMixin": ("transformers.cache_utils", "CacheLayerMixin"),
    "PreTrainedModel": ("transformers", "PreTrainedModel"),
    "PretrainedConfig": ("transformers", "PretrainedConfig"),
    "Tokenizer": ("transformers", "PreTrainedTokenizerBase"),
}
LAYER_COUNT_FIELDS = ("num_hidden_layers", "n_layer", "num_layers")
SIZE_FIELDS = (
    *LAYER_COUNT_FIELDS, "hidden_size", "intermediate_size", "vocab_size", "num_attention_heads", "num_key_value_heads",
    "head_dim", "max_position_embeddings", "n_embd", "n_head", "n_positions", "n_inner", "ffn_dim",
)  # fmt: skip
BUILDING = threading.Lock()  # two threads that replace and restore one method would leave a replacement behind
TOKENIZER_SUFFIXES = (".json", ".jinja", ".model", ".txt", ".tiktoken")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json", "qwen.tiktoken")


def __getattr__(name: str) -> Any:
    """A name of transformers at its first use (PEP 562)."""
    if name not in SOURCES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, original = SOURCES[name]
    globals()[name] = value = getattr(importlib.import_module(module), original)
    return value


def read_config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The transformers configuration of a checkpoint, without its quantization record and without remote code.

    Raises:
        BitwrightError: BW306 for a model type that transformers does not know, BW307 for fields that contradict
            themselves or the weights.
    """
    known: Any = importlib.import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    fields = dict(checkpoint.config)
    fields.pop("quantization_config", None)
    remote = fields.pop("auto_map", None)
    model_type = fields.pop("model_type", None)
    if not isinstance(model_type, str) or model_type not in known:
        near = difflib.get_close_matches(str(model_type), list(known), n=3, cutoff=0.3)
        raise BitwrightError(
            "BW306",
            f"transformers {__getattr__('VERSION')} knows no causal language model of type {model_type!r}",
            where=str(checkpoint.directory / "config.json"),
            why="code shipped with a model (auto_map) is never run" if remote else "",
            suggestion=f"nearest known types: {', '.join(near) or 'none'}",
        )
    _check_fields(checkpoint, fields)
    try:
        config: PretrainedConfig = importlib.import_module("transformers").AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # whatever a field of the wrong kind makes transformers raise
        raise _bad_config(checkpoint, f"{type(error).__name__}: {error}") from None
    return config


def empty_model(config: PretrainedConfig) -> PreTrainedModel:
    """The model with every parameter on the meta device and every buffer real, in evaluation mode.

    Raises:
        BitwrightError: BW307 if the architecture cannot be built from the configuration.
    """
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    try:
        with _parameters_on_meta(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about generation settings, which are not used here
            build: Any = importlib.import_module("transformers").AutoModelForCausalLM.from_config
            model: PreTrainedModel = build(config, dtype=dtype)
    except Exception as error:  # sizes that do not fit together surface as any kind of exception
        message = f"config.json does not describe a model: {type(error).__name__}: {error}"
        raise BitwrightError(
            "BW307", message, suggestion="restore the config.json that belongs to the weights"
        ) from None
    model.tie_weights()
    model.train(False)
    return model


def has_tokenizer(directory: Path) -> bool:
    """Whether a model directory holds a file of a tokenizer, sound or not."""
    return any((directory / name).is_file() for name in TOKENIZER_FILES)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a model directory; where it comes as code, that of the vocabulary beside the code.

    Raises:
        BitwrightError: BW312 if it is missing or cannot be read, BW310 if a file is a link out of the directory.
    """
    for path in directory.glob("*"):
        if path.is_symlink() and path.suffix in TOKENIZER_SUFFIXES:
            locate_file(directory, path.name)
    if not has_tokenizer(directory):
        raise BitwrightError(
            "BW312", "the model has no tokenizer", where=str(directory), suggestion="copy tokenizer.json there"
        )
    described = describe_coded(directory)
    try:
        tokenizer = _read_tokenizer(directory) if described is None else _make_tokenizer(directory, described)
    except Exception as error:  # the tokenizer readers raise anything, also from native code
        raise BitwrightError(
            "BW312",
            f"the tokenizer cannot be read: {type(error).__name__}: {error}",
            where=str(directory),
            suggestion="fetch the tokenizer files of the model again",
        ) from None
    base: type[Tokenizer] = __getattr__("Tokenizer")
    if not isinstance(tokenizer, base):
        what, suggestion = "the model's processor is not a text tokenizer", "give a directory of a text model"
        raise BitwrightError("BW312", what, where=str(directory), suggestion=suggestion)
    # What transformers makes of the settings alone has special tokens and no others.
    if tokenizer.vocab_size < 64 and not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        what = "the tokenizer has no vocabulary"
        raise BitwrightError("BW312", what, where=str(directory), suggestion="copy tokenizer.json there")
    return tokenizer


def _read_tokenizer(directory: Path) -> object:
    read: Any = importlib.import_module("transformers").AutoTokenizer.from_pretrained
    found: object = read(directory, local_files_only=True, trust_remote_code=False)
    return found


def _make_tokenizer(directory: Path, described: Description) -> object:
    backend = importlib.import_module("tokenizers").Tokenizer.from_str(described.text)
    make: Any = importlib.import_module("transformers").PreTrainedTokenizerFast
    special = [token.content for token in backend.get_added_tokens_decoder().values() if token.special]
    made: object = make(
        tokenizer_object=backend,
        name_or_path=str(directory),
        clean_up_tokenization_spaces=False,
        extra_special_tokens=[token for token in special if token not in described.settings.values()],
        **described.settings,
    )
    return made


def context_length(config: PretrainedConfig) -> int | None:
    """How many positions the model was made for; ``None`` where the configuration does not say."""
    for field in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = getattr(config, field, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Move each parameter to the meta device as a module registers it; buffers, which no file holds, stay real."""
    with BUILDING:
        register, builder = nn.Module.register_parameter, threading.get_ident()

        def register_on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
            register(module, name, parameter)
            is_ours = threading.get_ident() == builder
            if is_ours and parameter is not None and parameter.device.type != "meta":
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=False)

        nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            nn.Module.register_parameter = register  # type: ignore[method-assign]


def _check_fields(checkpoint: Checkpoint, fields: Mapping[str, Any]) -> None:
    """The contradictions that would otherwise surface late, or hang."""
    faults = []
    for name, value in fields.items():
        if name in SIZE_FIELDS and value is not None and (type(value) is not int or not 0 <= value < 1 << 31):
            faults.append(f"{name} is {value!r}, not a whole number")
    if not faults:
        faults = _contradictions(checkpoint, fields)
    if faults:
        raise _bad_config(checkpoint, "; ".join(faults))


def _contradictions(checkpoint: Checkpoint, fields: Mapping[str, Any]) -> list[str]:
    faults = []
    for name in LAYER_COUNT_FIELDS:
        if (fields.get(name) or 0) > len(checkpoint.tensors):
            faults.append(f"{name} is {fields[name]}, but the files hold {len(checkpoint.tensors)} tensors")
    heads, hidden = fields.get("num_attention_heads"), fields.get("hidden_size")
    if heads == 0 or hidden == 0:
        faults.append("hidden_size and num_attention_heads must be at least 1")
    elif heads and hidden and not fields.get("head_dim") and hidden % heads:
        faults.append(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    key_heads = fields.get("num_key_value_heads")
    if heads and key_heads is not None and (key_heads == 0 or heads % key_heads):
        faults.append(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {key_heads}")
    return faults


def _bad_config(checkpoint: Checkpoint, what: str) -> BitwrightError:
    return BitwrightError(
        "BW307",
        what,
        where=str(checkpoint.directory / "config.json"),
        suggestion="restore the config.json that belongs to the weights",
    )
