"""Checkpoints of InternLM2 and of the first Qwen, read as what they compute: a Llama, and a Qwen2 without groups.

transformers runs both only by code that the checkpoints bring along, which is never done here. But their blocks are
those of models that it has, under other names and with the weights of queries, keys and values in one matrix: rows of
it, which are read where they lie. InternLM2 has for each head of keys its queries, the key and the value, one after the
other; Qwen has all queries, all keys, all values. (Papers: InternLM2, arXiv 2403.17297; Qwen, arXiv 2309.16609.)

Both stretch their rotary positions (and Qwen scales its queries) behind the length that they were trained for; the
configuration that is made here ends there, so that neither ever happens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitwright.core.errors import BitwrightError
from bitwright.formats.safetensors_index import TensorEntry

__all__ = ["Unfused", "find_family", "unfuse"]

INTERNLM2 = (
    (r"model\.tok_embeddings\.(weight)", "model.embed_tokens.{0}"),
    (r"model\.norm\.(weight)", "model.norm.{0}"),
    (r"output\.(weight)", "lm_head.{0}"),
    (r"model\.layers\.(\d+)\.attention_norm\.(weight)", "model.layers.{0}.input_layernorm.{1}"),
    (r"model\.layers\.(\d+)\.ffn_norm\.(weight)", "model.layers.{0}.post_attention_layernorm.{1}"),
    (r"model\.layers\.(\d+)\.attention\.wo\.(weight|bias)", "model.layers.{0}.self_attn.o_proj.{1}"),
    (r"model\.layers\.(\d+)\.feed_forward\.w1\.(weight)", "model.layers.{0}.mlp.gate_proj.{1}"),
    (r"model\.layers\.(\d+)\.feed_forward\.w3\.(weight)", "model.layers.{0}.mlp.up_proj.{1}"),
    (r"model\.layers\.(\d+)\.feed_forward\.w2\.(weight)", "model.layers.{0}.mlp.down_proj.{1}"),
)
QWEN = (
    (r"transformer\.wte\.(weight)", "model.embed_tokens.{0}"),
    (r"transformer\.ln_f\.(weight)", "model.norm.{0}"),
    (r"lm_head\.(weight)", "lm_head.{0}"),
    (r"transformer\.h\.(\d+)\.ln_1\.(weight)", "model.layers.{0}.input_layernorm.{1}"),
    (r"transformer\.h\.(\d+)\.ln_2\.(weight)", "model.layers.{0}.post_attention_layernorm.{1}"),
    (r"transformer\.h\.(\d+)\.attn\.c_proj\.(weight)", "model.layers.{0}.self_attn.o_proj.{1}"),
    (r"transformer\.h\.(\d+)\.mlp\.w2\.(weight)", "model.layers.{0}.mlp.gate_proj.{1}"),
    (r"transformer\.h\.(\d+)\.mlp\.w1\.(weight)", "model.layers.{0}.mlp.up_proj.{1}"),
    (r"transformer\.h\.(\d+)\.mlp\.c_proj\.(weight)", "model.layers.{0}.mlp.down_proj.{1}"),
)
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "tie_word_embeddings")


@dataclass(frozen=True, slots=True)
class Unfused:
    """The configuration of the model that a checkpoint is, and its tensors: of each the name in the files and where it
    lies there."""

    config: dict[str, Any]
    tensors: dict[str, tuple[str, TensorEntry]]


@dataclass(frozen=True, slots=True)
class _Family:
    names: tuple[tuple[str, str], ...]
    fused: str
    translate: Callable[[Mapping[str, Any]], dict[str, Any]]
    rows: Callable[[Mapping[str, Any]], list[tuple[str, list[tuple[int, int]]]]]


def find_family(config: Mapping[str, Any]) -> str | None:
    """Of which of these families a model is, by its configuration; ``None`` if of neither."""
    kind = config.get("model_type")
    return kind if isinstance(kind, str) and kind in FAMILIES else None


def unfuse(directory: Path, config: Mapping[str, Any], tensors: Mapping[str, TensorEntry]) -> Unfused:
    """A checkpoint whose family :func:`find_family` has found, as one of a model that transformers has.

    Raises:
        BitwrightError: BW306 for a variant that no such model is, BW307 for fields that are missing or of the wrong
            kind, BW304 for a fused weight of another shape.
    """
    family = FAMILIES[config["model_type"]]
    where = str(directory / "config.json")
    if config.get("quantization_config") is not None:
        what = f"a quantized checkpoint of {config['model_type']} holds codes of fused weights, which are not read"
        raise BitwrightError("BW306", what, where=where, suggestion="quantize the original model with bitwright")
    try:
        translated = family.translate(config)
    except (KeyError, TypeError, ValueError) as error:
        what = f"a field is missing or wrong: {error}"
        raise BitwrightError("BW307", what, where=where, suggestion="restore the config.json of the weights") from None
    except NotImplementedError as error:
        raise BitwrightError(
            "BW306", str(error), where=where, suggestion="use the code that the model brings"
        ) from None
    found: dict[str, tuple[str, TensorEntry]] = {}
    for name, entry in tensors.items():
        fused = re.fullmatch(family.fused, name)
        if fused is None:
            found[_rename(name, family.names)] = (name, entry)
            continue
        _check_rows(directory, name, entry, translated)
        for part, ranges in family.rows(translated):
            found[f"model.layers.{fused[1]}.self_attn.{part}.{fused[2]}"] = (name, entry.rows(ranges))
    return Unfused(translated, found)


def _rename(name: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, target in names:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return target.format(*match.groups())
    return name


def _check_rows(directory: Path, name: str, entry: TensorEntry, config: Mapping[str, Any]) -> None:
    wanted = (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * config["head_dim"]
    if not entry.shape or entry.shape[0] != wanted:
        what = f"{name} has the shape {list(entry.shape)}; config.json calls for {wanted} rows"
        suggestion = "restore the config.json that belongs to the weights"
        raise BitwrightError("BW304", what, where=str(directory), suggestion=suggestion)


def _translate_internlm2(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = _sizes(config)
    groups = config.get("num_key_value_heads")
    heads = fields["num_attention_heads"]
    groups = heads if groups is None else _whole("num_key_value_heads", groups)
    if heads % groups:
        raise ValueError(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}")
    rope = config.get("rope_scaling")
    if rope is not None and (not isinstance(rope, dict) or rope.get("type") not in ("dynamic", "linear")):
        raise NotImplementedError(f"rotary positions of InternLM2 as {str(rope)[:100]} are not known")
    if config.get("hidden_act", "silu") != "silu":
        raise NotImplementedError(f"InternLM2 with activations of type {str(config['hidden_act'])[:40]!r} is not known")
    return fields | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": groups,
        "rms_norm_eps": config.get("rms_norm_eps", 1e-6), "rope_theta": config.get("rope_theta", 10000),
        "rope_scaling": rope if rope is not None and rope.get("type") == "linear" else None,
        "max_position_embeddings": _whole("max_position_embeddings", config.get("max_position_embeddings", 2048)),
        "attention_bias": bool(config.get("bias", True)), "mlp_bias": False, "hidden_act": "silu",
    }  # fmt: skip


def _translate_qwen(config: Mapping[str, Any]) -> dict[str, Any]:
    fields = _sizes(config)
    if config.get("no_bias", True) is not True:
        raise NotImplementedError("a Qwen with biases everywhere (no_bias is false) is not known")
    if config.get("rotary_pct", 1.0) != 1.0 or config.get("scale_attn_weights", True) is not True:
        raise NotImplementedError("a Qwen whose rotary_pct or scale_attn_weights is unusual is not known")
    if config.get("kv_channels", fields["head_dim"]) != fields["head_dim"] or fields["intermediate_size"] % 2:
        raise ValueError("kv_channels is not hidden_size / num_attention_heads, or intermediate_size is odd")
    trained = _whole("seq_length", config["seq_length"])
    context = _whole("max_position_embeddings", config.get("max_position_embeddings", trained))
    is_stretched = config.get("use_dynamic_ntk", True) or config.get("use_logn_attn", True)
    return fields | {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_act": "silu",
        "intermediate_size": fields["intermediate_size"] // 2,  # which counts both halves of the gated layer
        "num_key_value_heads": fields["num_attention_heads"], "rms_norm_eps": config.get("layer_norm_epsilon", 1e-6),
        "rope_theta": config.get("rotary_emb_base", 10000), "use_sliding_window": False, "sliding_window": None,
        "max_position_embeddings": min(trained, context) if is_stretched else context,
    }  # fmt: skip


def _sizes(config: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {name: _whole(name, config[name]) for name in SIZES}
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if hidden % heads:
        raise ValueError(f"hidden_size {hidden} is not a multiple of num_attention_heads {heads}")
    kept = {name: config[name] for name in KEPT if name in config}
    return sizes | {"head_dim": hidden // heads, "tie_word_embeddings": False} | kept


def _whole(name: str, value: object) -> int:
    if type(value) is not int or not 0 < value < 1 << 31:
        raise ValueError(f"{name} is {str(value)[:40]!r}")
    return value


def _grouped_rows(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[int, int]]]]:
    """For each head of keys its queries, the key, the value."""
    groups, width = config["num_key_value_heads"], config["head_dim"]
    queries = config["num_attention_heads"] // groups * width
    starts = [group * (queries + 2 * width) for group in range(groups)]
    return [
        ("q_proj", [(start, start + queries) for start in starts]),
        ("k_proj", [(start + queries, start + queries + width) for start in starts]),
        ("v_proj", [(start + queries + width, start + queries + 2 * width) for start in starts]),
    ]


def _stacked_rows(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[int, int]]]]:
    width = config["hidden_size"]
    return [(name, [(part * width, (part + 1) * width)]) for part, name in enumerate(("q_proj", "k_proj", "v_proj"))]


FAMILIES = {
    "internlm2": _Family(
        INTERNLM2, r"model\.layers\.(\d+)\.attention\.wqkv\.(weight|bias)", _translate_internlm2, _grouped_rows
    ),
    "qwen": _Family(QWEN, r"transformer\.h\.(\d+)\.attn\.c_attn\.(weight|bias)", _translate_qwen, _stacked_rows),
}
