"""``from_pretrained`` by the names of transformers, over bitwright's own loading."""

from __future__ import annotations

import types
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from bitwright.compat.qwen.cache import use_quantized_cache
from bitwright.compat.qwen.conversation import chat, chat_stream
from bitwright.core.errors import ArgumentError, Notice
from bitwright.models.hf import PreTrainedModel, Tokenizer, load_tokenizer
from bitwright.models.loading import load
from bitwright.models.location import resolve_model

__all__ = ["AutoModelForCausalLM", "AutoTokenizer"]

DEVICES = ("auto", "cpu", "balanced", "sequential")  # every way to place a model is the CPU where there is only that


class AutoModelForCausalLM:
    """Loads causal language models: float, or quantized in any format that bitwright reads, GPTQ Int4 and Int8 too."""

    def __init__(self) -> None:
        raise TypeError("AutoModelForCausalLM is not instantiated: call AutoModelForCausalLM.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        device_map: str | Mapping[str, str] | None = None,
        trust_remote_code: bool = False,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        use_cache_quantization: bool | None = None,
        use_cache_kernel: bool | None = None,
        use_flash_attn: bool | None = None,
    ) -> PreTrainedModel:
        """The model in evaluation mode, with the methods ``chat`` and ``chat_stream``.

        Args:
            pretrained_model_name_or_path: a directory, an id on the hub, or ``demo:``.
            device_map: where the model goes: the CPU, whatever "auto" would have chosen elsewhere.
            trust_remote_code: accepted, since the documentation gives it; code that comes with a model is never run.
            torch_dtype: of the activations and of all that is not quantized; ``None`` or "auto": as stored.
            dtype: the same, by its newer name.
            use_cache_quantization: store keys and values in 8-bit codes, with scales of each token and head; ``None``:
                as ``config.json`` says.
            use_cache_kernel, use_flash_attn: accepted, since the documentation gives them, with a notice: attention
                reads the codes without kernel files, block by block.

        Raises:
            BitwrightError: BW201 for an argument, and what :func:`bitwright.load` raises.
        """
        places = set(device_map.values()) if isinstance(device_map, Mapping) else {device_map or "auto"}
        if not places <= set(DEVICES):
            accepted = "one of " + ", ".join(DEVICES) + ', or {"": "cpu"}'
            raise ArgumentError("BW201", f"device_map is {device_map!r}", suggestion=accepted)
        if torch_dtype is not None and dtype is not None:
            raise ArgumentError("BW201", "torch_dtype and dtype are both given", suggestion="give one of them")
        wanted = torch_dtype if dtype is None else dtype
        if isinstance(wanted, str) and wanted != "auto":
            raise ArgumentError("BW201", f"torch_dtype is {wanted!r}", suggestion='a torch.dtype, or "auto"')
        _notice_remote_code(trust_remote_code)
        loaded = load(pretrained_model_name_or_path, dtype=None if isinstance(wanted, str) else wanted)
        switches = {
            "use_cache_quantization": use_cache_quantization,
            "use_cache_kernel": use_cache_kernel,
            "use_flash_attn": use_flash_attn,
        }
        use_quantized_cache(loaded, switches)
        for method in (chat, chat_stream):
            setattr(loaded, method.__name__, types.MethodType(method, loaded))
        return loaded


class AutoTokenizer:
    """Loads the tokenizer of a model."""

    def __init__(self) -> None:
        raise TypeError("AutoTokenizer is not instantiated: call AutoTokenizer.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, trust_remote_code: bool = False
    ) -> Tokenizer:
        """The tokenizer of a directory, of an id on the hub, or of ``demo:``.

        Raises:
            BitwrightError: BW201 for an argument, BW301 or BW504 if there is no such model, BW312 without a tokenizer.
        """
        _notice_remote_code(trust_remote_code)
        return load_tokenizer(resolve_model(pretrained_model_name_or_path))


def _notice_remote_code(trust_remote_code: bool) -> None:
    if type(trust_remote_code) is not bool:
        raise ArgumentError("BW201", f"trust_remote_code is {trust_remote_code!r}", suggestion="True or False")
    if trust_remote_code:
        message = "trust_remote_code has no effect: bitwright never runs code that comes with a model"
        warnings.warn(message, Notice, stacklevel=3)
