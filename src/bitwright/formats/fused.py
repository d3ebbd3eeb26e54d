"""Checkpoints of InternLM2 and of the first Qwen, read as what they compute: a Llama, and a Qwen2 without groups.

transformers runs both only by code that the checkpoints bring along, which is never done here. But their blocks are
those of models that it has, under other names and with the weights of queries, keys and values in one matrix: rows of
it. InternLM2 has for each head of keys its queries, the key and the value, one after the other; Qwen has all queries,
all keys, all values. (Papers: InternLM2, arXiv 2403.17297; Qwen, arXiv 2309.16609.)

Rows of float weights are read where they lie. Of a quantized layer the rows are not to be found without unpacking it,
and what its format says of it goes by the name that it has in the files: its tensors keep that name here, and
:mod:`bitwright.formats.parts` takes it apart. Its bias, which is never quantized, goes with the float weights.

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

__all__ = ["Part", "Unfused", "find_family", "unfuse"]

# Names of layers: in the files, and in the model.
INTERNLM2 = (
    (r"model\.tok_embeddings", "model.embed_tokens"),
    (r"model\.norm", "model.norm"),
    (r"output", "lm_head"),
    (r"model\.layers\.(\d+)\.attention_norm", "model.layers.{0}.input_layernorm"),
    (r"model\.layers\.(\d+)\.ffn_norm", "model.layers.{0}.post_attention_layernorm"),
    (r"model\.layers\.(\d+)\.attention\.wo", "model.layers.{0}.self_attn.o_proj"),
    (r"model\.layers\.(\d+)\.feed_forward\.w1", "model.layers.{0}.mlp.gate_proj"),
    (r"model\.layers\.(\d+)\.feed_forward\.w3", "model.layers.{0}.mlp.up_proj"),
    (r"model\.layers\.(\d+)\.feed_forward\.w2", "model.layers.{0}.mlp.down_proj"),
)
QWEN = (
    (r"transformer\.wte", "model.embed_tokens"),
    (r"transformer\.ln_f", "model.norm"),
    (r"lm_head", "lm_head"),
    (r"transformer\.h\.(\d+)\.ln_1", "model.layers.{0}.input_layernorm"),
    (r"transformer\.h\.(\d+)\.ln_2", "model.layers.{0}.post_attention_layernorm"),
    (r"transformer\.h\.(\d+)\.attn\.c_proj", "model.layers.{0}.self_attn.o_proj"),
    (r"transformer\.h\.(\d+)\.mlp\.w2", "model.layers.{0}.mlp.gate_proj"),
    (r"transformer\.h\.(\d+)\.mlp\.w1", "model.layers.{0}.mlp.up_proj"),
    (r"transformer\.h\.(\d+)\.mlp\.c_proj", "model.layers.{0}.mlp.down_proj"),
)
FLOAT = ("weight", "bias")  # all that a layer has which is not quantized
SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
KEPT = ("bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "tie_word_embeddings")
PRECISIONS = (("bf16", "bfloat16"), ("fp16", "float16"))  # flags of Qwen


@dataclass(frozen=True, slots=True)
class Part:
    """A layer of the model: its name, and which rows ``[first, end)`` of what the files hold it is; none: all."""

    name: str
    rows: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True, slots=True)
class Unfused:
    """The configuration of the model that a checkpoint is, and its tensors: of each the name in the files and where it
    lies there. ``parts``: of each quantized layer, by its name in the files, the layers of the model that it is."""

    config: dict[str, Any]
    tensors: dict[str, tuple[str, TensorEntry]]
    parts: dict[str, tuple[Part, ...]]


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
        BitwrightError: BW303 for two tensors of one meaning, BW306 for a variant that no such model is, BW307 for
            fields that are missing or of the wrong kind, BW304 for a fused weight of another shape.
    """
    family = FAMILIES[config["model_type"]]
    translated = _translate(directory, family, config)
    owners = {name: owner for name in tensors if (owner := _find_owner(name, family, translated)) is not None}
    quantized = {layer for layer, leaf, _ in owners.values() if leaf not in FLOAT}
    if translated.get("quantization_config") is None:
        quantized = set()
    found: dict[str, tuple[str, TensorEntry]] = {}
    parts: dict[str, tuple[Part, ...]] = {}
    for name, entry in tensors.items():
        layer, leaf, own = owners.get(name, ("", "", ()))
        if layer in quantized:
            parts[layer] = own
        if leaf not in FLOAT or (layer in quantized and leaf != "bias"):
            targets = [(name, entry)]
        else:
            targets = [(f"{part.name}.{leaf}", _take_rows(directory, name, entry, own, part)) for part in own]
        for target, rows in targets:
            if target in found:
                raise _twice(directory, name, found[target][0])
            found[target] = (name, rows)
    return Unfused(translated, found, parts)


def _translate(directory: Path, family: _Family, config: Mapping[str, Any]) -> dict[str, Any]:
    where = str(directory / "config.json")
    try:
        translated = family.translate(config)
    except (KeyError, TypeError, ValueError) as error:
        what = f"a field is missing or wrong: {error}"
        raise BitwrightError("BW307", what, where=where, suggestion="restore the config.json of the weights") from None
    except NotImplementedError as error:
        raise BitwrightError(
            "BW306", str(error), where=where, suggestion="use the code that the model brings"
        ) from None
    record = config.get("quantization_config")
    return translated if record is None else translated | {"quantization_config": record}


def _find_owner(name: str, family: _Family, config: Mapping[str, Any]) -> tuple[str, str, tuple[Part, ...]] | None:
    """The layer that a tensor belongs to, the rest of its name, and what layers of the model that layer is."""
    fused = re.fullmatch(rf"({family.fused})\.(.+)", name)
    if fused is not None:
        layer, number, leaf = fused.groups()
        rows = family.rows(config)
        parts = tuple(Part(f"model.layers.{number}.self_attn.{part}", tuple(ranges)) for part, ranges in rows)
        return layer, leaf, parts
    for pattern, target in family.names:
        match = re.fullmatch(rf"({pattern})\.(.+)", name)
        if match is not None:
            layer, *numbers, leaf = match.groups()
            return layer, leaf, (Part(target.format(*numbers)),)
    return None


def _take_rows(directory: Path, name: str, entry: TensorEntry, parts: tuple[Part, ...], part: Part) -> TensorEntry:
    if not part.rows:
        return entry
    wanted = sum(end - first for other in parts for first, end in other.rows)
    if not entry.shape or entry.shape[0] != wanted:
        what = f"{name} has the shape {list(entry.shape)}; config.json calls for {wanted} rows"
        suggestion = "restore the config.json that belongs to the weights"
        raise BitwrightError("BW304", what, where=str(directory), suggestion=suggestion)
    return entry.rows(part.rows)


def _twice(directory: Path, name: str, other: str) -> BitwrightError:
    what = f"the files hold both {other} and {name}, which are one tensor of the model"
    return BitwrightError("BW303", what, where=str(directory), suggestion="remove the one that does not belong")


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
    named = next((dtype for flag, dtype in PRECISIONS if config.get(flag) is True), None)
    if named is not None and fields.get("torch_dtype") is None and fields.get("dtype") is None:
        fields["torch_dtype"] = named
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
    "internlm2": _Family(INTERNLM2, r"model\.layers\.(\d+)\.attention\.wqkv", _translate_internlm2, _grouped_rows),
    "qwen": _Family(QWEN, r"transformer\.h\.(\d+)\.attn\.c_attn", _translate_qwen, _stacked_rows),
}
