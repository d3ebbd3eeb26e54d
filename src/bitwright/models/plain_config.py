"""What a decoder must know of ``config.json``, read without transformers.

Only configurations that say everything themselves, in the fields that every writer uses, are read here; for all others
there is transformers, with its defaults and its history. What is read here means there the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["PlainConfig", "read_plain"]

# For each model type: whether queries, keys and values, the output of attention, and the MLP have biases (or the field
# that tells), the token that ends a text unless a field says, and fields without which transformers has defaults that
# are not restated here.
QKV_BIAS: dict[str, str | bool] = {
    "llama": "attention_bias",
    "mistral": False,
    "qwen2": True,
    "qwen3": "attention_bias",
}
OUTPUT_BIAS: dict[str, str | bool] = {
    "llama": "attention_bias",
    "mistral": False,
    "qwen2": False,
    "qwen3": "attention_bias",
}
MLP_BIAS: dict[str, str | bool] = {"llama": "mlp_bias", "mistral": False, "qwen2": False, "qwen3": False}
END = {"llama": 2, "mistral": 2, "qwen2": None, "qwen3": None}
NEEDED = {
    "llama": (),
    "mistral": ("num_key_value_heads", "sliding_window"),
    "qwen2": ("num_key_value_heads",),
    "qwen3": ("num_key_value_heads", "head_dim"),
}
SIZES = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size",
    "max_position_embeddings",
)  # fmt: skip
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, None: torch.float32}
# Fields that change what a model computes, and are not understood here unless they are absent, null or false.
STRANGE = ("partial_rotary_factor", "original_max_position_embeddings", "use_sliding_window")
ROPE_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
}
DEFAULT_THETA = 10000.0
MOST_LAYERS = 4096


@dataclass(slots=True, kw_only=True)
class PlainConfig:
    """The fields under the names that transformers has for them; ``inverse_frequencies`` are of the rotary positions.

    ``sliding_window`` is that of a Mistral, whose every layer has it. (Not frozen: weights may say that a head is not
    tied, whatever the file says.)
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    hidden_act: str
    tie_word_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    sliding_window: int | None
    dtype: torch.dtype
    eos_token_id: Any
    rope_type: str
    inverse_frequencies: Tensor
    name_or_path: str = ""


def read_plain(fields: Mapping[str, Any]) -> PlainConfig | None:
    """The configuration in the fields of a ``config.json``; ``None`` if it takes transformers to understand them."""
    kind = fields.get("model_type")
    if not isinstance(kind, str) or kind not in NEEDED:
        return None
    if any(name not in fields for name in (*NEEDED[kind], *SIZES, "rms_norm_eps")):
        return None
    if any(fields.get(name) not in (None, False) for name in STRANGE):
        return None
    if kind == "mistral" and fields["num_key_value_heads"] is None:
        return None
    heads, layers = fields["num_attention_heads"], fields["num_hidden_layers"]
    groups = heads if fields.get("num_key_value_heads") is None else fields["num_key_value_heads"]
    sizes = {name: fields[name] for name in SIZES}
    if not all(type(size) is int and 0 < size < 1 << 31 for size in (*sizes.values(), heads, groups)):
        return None
    if layers > MOST_LAYERS or fields.get("layer_types") not in (None, ["full_attention"] * layers):
        return None
    width = fields["hidden_size"] // heads if fields.get("head_dim") is None else fields["head_dim"]
    rope = None if type(width) is not int or width < 2 or width % 2 else _read_rope(fields, width)
    flags = [_flag(fields, value) for value in (QKV_BIAS[kind], OUTPUT_BIAS[kind], MLP_BIAS[kind])]
    tied, epsilon = _flag(fields, "tie_word_embeddings"), fields["rms_norm_eps"]
    dtype = fields["dtype"] if fields.get("dtype") is not None else fields.get("torch_dtype")
    window, act = fields.get("sliding_window"), fields.get("hidden_act", "silu")
    is_plain = (
        rope is not None
        and heads % groups == 0
        and fields["hidden_size"] % heads == 0
        and None not in (*flags, tied)
        and type(epsilon) is float
        and math.isfinite(epsilon)
        and (dtype is None or type(dtype) is str)
        and dtype in DTYPES
        and (window is None or (type(window) is int and window > 0))
        and type(act) is str
    )
    if not is_plain or rope is None:
        return None
    return PlainConfig(
        model_type=kind, **sizes, num_key_value_heads=groups, head_dim=width, rms_norm_eps=epsilon, hidden_act=act,
        tie_word_embeddings=bool(tied), qkv_bias=bool(flags[0]), output_bias=bool(flags[1]), mlp_bias=bool(flags[2]),
        sliding_window=window if kind == "mistral" else None, dtype=DTYPES[dtype],
        eos_token_id=fields.get("eos_token_id", END[kind]), rope_type=rope[0], inverse_frequencies=rope[1],
    )  # fmt: skip


def _flag(fields: Mapping[str, Any], name: str | bool) -> bool | None:
    """A field that is true or false (absent: false); ``None`` if it is neither."""
    value = name if isinstance(name, bool) else fields.get(name, False)
    return value if isinstance(value, bool) else None


def _read_rope(fields: Mapping[str, Any], width: int) -> tuple[str, Tensor] | None:
    """The kind of the rotary positions, and their inverse frequencies, float32 ``[width / 2]``."""
    given = fields.get("rope_scaling") or fields.get("rope_parameters") or {}
    if not isinstance(given, Mapping) or any(isinstance(value, dict | list) for value in given.values()):
        return None
    given = {name: value for name, value in given.items() if value is not None}
    kind = given.get("rope_type", given.get("type", "default"))
    theta = given.get("rope_theta", fields.get("rope_theta", DEFAULT_THETA))
    known = {"rope_type", "type", "rope_theta"}
    if kind not in ROPE_FIELDS or set(given) - known - ROPE_FIELDS[kind]:
        return None
    numbers = {"original_max_position_embeddings": fields["max_position_embeddings"], **given}
    needed = [theta, *(numbers.get(name) for name in ROPE_FIELDS[kind])]
    if not all(type(number) in (int, float) and 0 < number < math.inf for number in needed):
        return None
    plain = 1.0 / (theta ** (torch.arange(0, width, 2, dtype=torch.float32) / width))
    if kind == "linear":
        return kind, plain / numbers["factor"]
    return kind, plain if kind == "default" else _stretch(plain, numbers)


def _stretch(frequencies: Tensor, numbers: Mapping[str, Any]) -> Tensor:
    """Llama 3.1's: long waves become longer by ``factor``, short ones stay, and those between are mixed."""
    factor, low, high = (numbers[name] for name in ("factor", "low_freq_factor", "high_freq_factor"))
    context = numbers["original_max_position_embeddings"]
    if low == high:
        return frequencies
    waves = 2 * math.pi / frequencies
    is_long, is_short = waves > context / low, waves < context / high
    share = (context / waves - low) / (high - low)
    between = (1 - share) * frequencies / factor + share * frequencies
    return torch.where(is_long, frequencies / factor, torch.where(is_short, frequencies, between))
