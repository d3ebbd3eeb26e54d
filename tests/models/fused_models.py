"""InternLM2 and the first Qwen: small checkpoints under their own names, and their forward passes in float64."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme
from bitwright.core.scheme_names import parse
from bitwright.formats.records import LayerRecord
from bitwright.formats.table import get_format

__all__ = [
    "GROUPS", "HEADS", "HIDDEN", "INTERNLM2", "MODELS", "QWEN", "VOCABULARY", "WIDTH", "Made", "internlm2_logits",
    "quantized", "qwen_logits", "rounded_layer", "saved",
]  # fmt: skip

HIDDEN, HEADS, GROUPS, INNER, LAYERS, VOCABULARY = 64, 4, 2, 96, 2, 80
WIDTH = HIDDEN // HEADS
Tensors = dict[str, Tensor]
INTERNLM2: dict[str, Any] = {
    "architectures": ["InternLM2ForCausalLM"], "model_type": "internlm2", "hidden_size": HIDDEN, "bias": False,
    "auto_map": {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}, "rms_norm_eps": 1e-5,
    "intermediate_size": INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "hidden_act": "silu",
    "num_key_value_heads": GROUPS, "vocab_size": VOCABULARY, "max_position_embeddings": 128, "rope_theta": 1e6,
    "rope_scaling": {"type": "dynamic", "factor": 2.0}, "torch_dtype": "float32", "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "architectures": ["QWenLMHeadModel"], "model_type": "qwen", "hidden_size": HIDDEN, "no_bias": True,
    "auto_map": {"AutoModelForCausalLM": "modeling_qwen.QWenLMHeadModel"}, "layer_norm_epsilon": 1e-6,
    "intermediate_size": 2 * INNER, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "kv_channels": WIDTH,
    "vocab_size": VOCABULARY, "max_position_embeddings": 256, "seq_length": 128, "rotary_emb_base": 10000,
    "rotary_pct": 1.0, "scale_attn_weights": True, "use_dynamic_ntk": True, "use_logn_attn": True, "fp16": True,
    "torch_dtype": "float32", "tie_word_embeddings": False,
}  # fmt: skip


def internlm2_tensors(draw: Callable[..., Tensor], bias: bool, vocabulary: int) -> Tensors:
    rows = (HEADS + 2 * GROUPS) * WIDTH
    tensors = {"model.tok_embeddings.weight": draw(vocabulary, HIDDEN), "output.weight": draw(vocabulary, HIDDEN)}
    tensors["model.norm.weight"] = 1 + draw(HIDDEN)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        tensors |= {
            f"{name}.attention.wqkv.weight": draw(rows, HIDDEN), f"{name}.attention.wo.weight": draw(HIDDEN, HIDDEN),
            f"{name}.feed_forward.w1.weight": draw(INNER, HIDDEN),
            f"{name}.feed_forward.w3.weight": draw(INNER, HIDDEN),
            f"{name}.feed_forward.w2.weight": draw(HIDDEN, INNER),
            f"{name}.attention_norm.weight": 1 + draw(HIDDEN), f"{name}.ffn_norm.weight": 1 + draw(HIDDEN),
        }  # fmt: skip
        if bias:
            tensors |= {f"{name}.attention.wqkv.bias": draw(rows), f"{name}.attention.wo.bias": draw(HIDDEN)}
    return tensors


def qwen_tensors(draw: Callable[..., Tensor], vocabulary: int) -> Tensors:
    tensors = {"transformer.wte.weight": draw(vocabulary, HIDDEN), "lm_head.weight": draw(vocabulary, HIDDEN)}
    tensors["transformer.ln_f.weight"] = 1 + draw(HIDDEN)
    for layer in range(LAYERS):
        name = f"transformer.h.{layer}"
        tensors |= {
            f"{name}.attn.c_attn.weight": draw(3 * HIDDEN, HIDDEN), f"{name}.attn.c_attn.bias": draw(3 * HIDDEN),
            f"{name}.attn.c_proj.weight": draw(HIDDEN, HIDDEN), f"{name}.ln_1.weight": 1 + draw(HIDDEN),
            f"{name}.mlp.w1.weight": draw(INNER, HIDDEN), f"{name}.mlp.w2.weight": draw(INNER, HIDDEN),
            f"{name}.mlp.c_proj.weight": draw(HIDDEN, INNER), f"{name}.ln_2.weight": 1 + draw(HIDDEN),
        }  # fmt: skip
    return tensors


def draw_tensors(config: dict[str, Any]) -> Tensors:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape).normal_(0, 0.2, generator=generator)

    rows = config["vocab_size"]
    return qwen_tensors(draw, rows) if config["model_type"] == "qwen" else internlm2_tensors(draw, config["bias"], rows)


def saved(directory: Path, config: dict[str, Any], **changes: Any) -> tuple[Path, Tensors]:
    config = {**config, **changes}
    tensors = draw_tensors(config)
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory, tensors


def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + epsilon).sqrt() * weight


def attend(q: Tensor, k: Tensor, v: Tensor, base: float) -> Tensor:
    """Causal attention of ``[tokens, heads, width]`` with rotary positions; each head of keys has its queries."""
    tokens = q.shape[0]
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] / base ** (torch.arange(0, WIDTH, 2) / WIDTH)
    cosine, sine = angles.cos().repeat(1, 2)[:, None], angles.sin().repeat(1, 2)[:, None]

    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cosine + torch.cat([-second, first], dim=-1) * sine

    q, k = turn(q), turn(k).repeat_interleave(HEADS // k.shape[1], dim=1)
    v = v.repeat_interleave(HEADS // v.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(WIDTH)
    scores = scores.masked_fill(torch.ones(tokens, tokens).triu(1).bool(), -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).reshape(tokens, HIDDEN)


def internlm2_logits(tensors: Tensors, tokens: list[int], bias: bool) -> Tensor:
    """The published forward pass: ``wqkv`` gives ``[heads of keys, queries of each + key + value, width]``."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    silu = torch.nn.functional.silu
    x = t["model.tok_embeddings.weight"][tokens]
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        y = norm(x, t[f"{name}.attention_norm.weight"], 1e-5) @ t[f"{name}.attention.wqkv.weight"].T
        y = y + t[f"{name}.attention.wqkv.bias"] if bias else y
        parts = y.view(len(tokens), GROUPS, HEADS // GROUPS + 2, WIDTH)
        q = parts[:, :, :-2].reshape(len(tokens), HEADS, WIDTH)
        y = attend(q, parts[:, :, -2], parts[:, :, -1], 1e6) @ t[f"{name}.attention.wo.weight"].T
        x = x + (y + t[f"{name}.attention.wo.bias"] if bias else y)
        y = norm(x, t[f"{name}.ffn_norm.weight"], 1e-5)
        gate, up = (y @ t[f"{name}.feed_forward.{part}.weight"].T for part in ("w1", "w3"))
        x = x + (silu(gate) * up) @ t[f"{name}.feed_forward.w2.weight"].T
    return norm(x, t["model.norm.weight"], 1e-5) @ t["output.weight"].T


def qwen_logits(tensors: Tensors, tokens: list[int], _: bool) -> Tensor:
    """The published forward pass, of texts that are not longer than the training's: ``w1(x) * silu(w2(x))``."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    x = t["transformer.wte.weight"][tokens]
    for layer in range(LAYERS):
        name = f"transformer.h.{layer}"
        y = norm(x, t[f"{name}.ln_1.weight"], 1e-6) @ t[f"{name}.attn.c_attn.weight"].T
        q, k, v = (part.view(-1, HEADS, WIDTH) for part in (y + t[f"{name}.attn.c_attn.bias"]).split(HIDDEN, dim=-1))
        x = x + attend(q, k, v, 1e4) @ t[f"{name}.attn.c_proj.weight"].T
        y = norm(x, t[f"{name}.ln_2.weight"], 1e-6)
        a, b = (y @ t[f"{name}.mlp.{part}.weight"].T for part in ("w1", "w2"))
        x = x + (a * torch.nn.functional.silu(b)) @ t[f"{name}.mlp.c_proj.weight"].T
    return norm(x, t["transformer.ln_f.weight"], 1e-6) @ t["lm_head.weight"].T


BLOCKS = {"qwen": "transformer.h.", "internlm2": "model.layers."}
MODELS = {"qwen": QWEN, "internlm2": INTERNLM2, "internlm2-bias": {**INTERNLM2, "bias": True}}


class Made(NamedTuple):
    """A checkpoint; its float model before (``drawn``) and after (``rounded``) the layers were rounded."""

    directory: Path
    config: dict[str, Any]
    drawn: dict[str, Tensor]
    rounded: dict[str, Tensor]


def rounded_layer(weight: Tensor, scheme: LayerScheme, reorder: bool) -> QuantizedTensor:
    """To nearest; with ``reorder``, groups of columns that are not neighbours."""
    if not reorder or scheme.weight.group is None:
        return QuantizedTensor.quantize(weight, scheme.weight)
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(weight.shape[1]))
    there = QuantizedTensor.quantize(weight[:, order].contiguous(), scheme.weight)
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel())
    index = (place // scheme.weight.group).to(torch.int32)
    return replace(there, codes=there.codes[:, place].contiguous(), group_index=index)


def quantized(
    directory: Path,
    model: str,
    layout: str,
    scheme_name: str,
    *,
    reorder: bool = False,
    head: bool = False,
    **changes: Any,
) -> Made:
    """Round every layer of the blocks (and the head), and write the fused matrices as the format lays out any other."""
    config, scheme, written = {**MODELS[model], **changes}, parse(scheme_name), get_format(layout)
    drawn = draw_tensors(config)
    taken = [name for name in drawn if name.startswith(BLOCKS[config["model_type"]]) and drawn[name].dim() == 2]
    taken += [name for name in ("output.weight", "lm_head.weight") if head and name in drawn]
    layers = {name.removesuffix(".weight"): rounded_layer(drawn[name], scheme, reorder) for name in taken}
    tensors = {name: tensor for name, tensor in drawn.items() if name not in taken}
    for name, layer in layers.items():
        tensors |= written.encode(name, layer, scheme)
    records = {name: LayerRecord(scheme, layer.shape, reorder) for name, layer in layers.items()}
    config["quantization_config"] = written.config(records, [])
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors")
    rounded = drawn | {f"{name}.weight": layer.dequantize() for name, layer in layers.items()}
    return Made(directory, config, drawn, rounded)
