"""Float checkpoints of random weights in the shapes of known models, for measurements that need size and not sense."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

FIELDS = ("hidden", "intermediate", "blocks", "heads", "key_heads", "vocabulary")
SHAPES = {
    "qwen2.5-0.5b": (896, 4864, 24, 14, 2, 151936),
    "qwen2.5-1.5b": (1536, 8960, 28, 12, 2, 151936),
}
BLOCKS_A_SHARD = 7


def make_checkpoint(directory: Path, shape: str, *, blocks: int | None = None, seed: int = 0) -> None:
    """Write a Qwen2 checkpoint (bf16, tied embeddings, several shards) of random weights to ``directory``."""
    sizes = dict(zip(FIELDS, SHAPES[shape], strict=True)) | ({"blocks": blocks} if blocks else {})
    hidden, count = sizes["hidden"], sizes["blocks"]
    directory.mkdir(parents=True)
    config = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "hidden_size": hidden,
        "intermediate_size": sizes["intermediate"], "num_hidden_layers": count, "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["key_heads"], "vocab_size": sizes["vocabulary"], "max_position_embeddings": 32768,
        "tie_word_embeddings": True, "dtype": "bfloat16", "rope_theta": 1000000.0, "rms_norm_eps": 1e-6,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    generator = torch.Generator().manual_seed(seed)
    shards = [{"model.embed_tokens.weight": _random(generator, sizes["vocabulary"], hidden)}]
    total = -(-count // BLOCKS_A_SHARD) + 1
    weight_map: dict[str, str] = {}
    for start in range(0, count, BLOCKS_A_SHARD):
        _save(directory, shards.pop(), len(set(weight_map.values())), total, weight_map)
        shard: dict[str, torch.Tensor] = {}
        for block in range(start, min(start + BLOCKS_A_SHARD, count)):
            shard |= _block(generator, sizes, f"model.layers.{block}")
        shards.append(shard)
    shards[0]["model.norm.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    _save(directory, shards.pop(), total - 1, total, weight_map)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _block(generator: torch.Generator, sizes: dict[str, int], name: str) -> dict[str, torch.Tensor]:
    hidden, wide = sizes["hidden"], sizes["intermediate"]
    narrow = hidden // sizes["heads"] * sizes["key_heads"]
    outputs = {
        "self_attn.q_proj": (hidden, hidden), "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden), "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (wide, hidden), "mlp.up_proj": (wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }  # fmt: skip
    tensors = {f"{name}.{layer}.weight": _random(generator, *shape) for layer, shape in outputs.items()}
    for layer in ("q_proj", "k_proj", "v_proj"):
        out = outputs[f"self_attn.{layer}"][0]
        tensors[f"{name}.self_attn.{layer}.bias"] = torch.zeros(out, dtype=torch.bfloat16)
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors[f"{name}.{norm}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    return tensors


def _random(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


def _save(
    directory: Path, tensors: dict[str, torch.Tensor], index: int, total: int, weight_map: dict[str, str]
) -> None:
    name = f"model-{index + 1:05d}-of-{total:05d}.safetensors"
    save_file(tensors, directory / name, metadata={"format": "pt"})
    weight_map |= dict.fromkeys(tensors, name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-1.5b")
    parser.add_argument("--blocks", type=int)
    arguments = parser.parse_args()
    make_checkpoint(arguments.directory, arguments.shape, blocks=arguments.blocks)
