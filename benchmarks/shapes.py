"""Checkpoints of random weights in the shapes of known models: for measurements that need size and not sense.

python -m benchmarks.shapes DIR --shape llama-3.2-1b
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

BLOCKS_A_SHARD = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a dense decoder whose head is its embedding."""

    family: str
    hidden: int
    intermediate: int
    blocks: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int

    def layers(self) -> dict[str, tuple[int, int]]:
        """``{name in the block: (out, in)}``."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (queries, self.hidden), "self_attn.k_proj": (keys, self.hidden),
            "self_attn.v_proj": (keys, self.hidden), "self_attn.o_proj": (self.hidden, queries),
            "mlp.gate_proj": (self.intermediate, self.hidden), "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }  # fmt: skip


SHAPES = {
    "qwen2.5-0.5b": Shape(
        family="qwen2", hidden=896, intermediate=4864, blocks=24, heads=14, kv_heads=2, head_dim=64, vocabulary=151936
    ),
    "llama-3.2-1b": Shape(
        family="llama", hidden=2048, intermediate=8192, blocks=16, heads=32, kv_heads=8, head_dim=64, vocabulary=128256
    ),
    "qwen2.5-1.5b": Shape(
        family="qwen2", hidden=1536, intermediate=8960, blocks=28, heads=12, kv_heads=2, head_dim=128, vocabulary=151936
    ),
}  # fmt: skip


def make_checkpoint(directory: Path, shape: Shape, *, seed: int = 0) -> None:
    """Write a bfloat16 checkpoint of random weights in several shards, and no tokenizer, to ``directory``."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(_config(shape), indent=2), encoding="utf-8")
    weight_map: dict[str, str] = {}
    for number, tensors in enumerate(_shards(shape, torch.Generator().manual_seed(seed))):
        name = f"model-{number + 1:05d}.safetensors"
        save_file(tensors, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def _config(shape: Shape) -> dict[str, object]:
    names = {"qwen2": "Qwen2ForCausalLM", "llama": "LlamaForCausalLM"}
    theta = {"qwen2": 1e6, "llama": 5e5}
    return {
        "architectures": [names[shape.family]], "model_type": shape.family, "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate, "num_hidden_layers": shape.blocks, "head_dim": shape.head_dim,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocabulary,
        "max_position_embeddings": 32768, "tie_word_embeddings": True, "dtype": "bfloat16", "hidden_act": "silu",
        "rope_theta": theta[shape.family], "rms_norm_eps": 1e-6, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip


def _shards(shape: Shape, generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    def draw(*size: int) -> Tensor:
        return torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    def ones() -> Tensor:
        return torch.ones(shape.hidden, dtype=torch.bfloat16)

    yield {"model.embed_tokens.weight": draw(shape.vocabulary, shape.hidden), "model.norm.weight": ones()}
    for start in range(0, shape.blocks, BLOCKS_A_SHARD):
        shard: dict[str, Tensor] = {}
        for block in range(start, min(start + BLOCKS_A_SHARD, shape.blocks)):
            for name, size in shape.layers().items():
                shard[f"model.layers.{block}.{name}.weight"] = draw(*size)
                if shape.family == "qwen2" and name.split(".")[1] in ("q_proj", "k_proj", "v_proj"):
                    shard[f"model.layers.{block}.{name}.bias"] = draw(size[0])
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shard[f"model.layers.{block}.{norm}.weight"] = ones()
        yield shard


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="qwen2.5-0.5b")
    arguments = parser.parse_args()
    make_checkpoint(arguments.directory, SHAPES[arguments.shape])
