"""Tiny random models of many families, their tokenizer, and what is compared between runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

__all__ = ["FAMILIES", "TEXT", "Plain", "build_model", "digests", "file_tensors", "save_model"]

ALPHABET = "abcdefghijklmnopqrstuvwxyz .,\n"
VOCABULARY = 32
TEXT = "once upon a time there was a small model.\nit had two blocks, and it was quantized.\n" * 40

_ROTARY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128,
}  # fmt: skip
_GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": VOCABULARY}
_IDS = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}

# Fields of the configuration by family; every linear of a block has 32, 64 or 128 input features.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _ROTARY,
    "qwen2": _ROTARY | {"tie_word_embeddings": True},
    "qwen3": _ROTARY | {"head_dim": 8},
    "mistral": _ROTARY | {"head_dim": 8, "sliding_window": 8},
    "gemma": _ROTARY | {"head_dim": 8},
    "gemma2": _ROTARY | {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": _ROTARY | {"head_dim": 8, "sliding_window": 8, "sliding_window_pattern": 2},
    "phi": _ROTARY | {"num_key_value_heads": 4},
    "phi3": _ROTARY | {"pad_token_id": 0},
    "stablelm": _ROTARY,
    "gpt2": _GPT,
    "gptj": _GPT | {"rotary_dim": 4},
    "gpt_neox": _ROTARY,
    "gpt_bigcode": _GPT,
    "opt": _ROTARY | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4, "vocab_size": VOCABULARY},
    "falcon": _ROTARY | {"alibi": False, "new_decoder_architecture": False},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 128, "vocab_size": VOCABULARY},
}


def build_model(
    family: str = "qwen2", *, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: Any
) -> PreTrainedModel:
    """A model of ``family`` with normal weights and biases, in evaluation mode."""
    config = AutoConfig.for_model(family, **({**FAMILIES[family], **_IDS, **fields}))
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:
                centre = 1.0 if "norm" in name and not name.endswith("bias") else 0.0
                parameter.normal_(centre, 0.05)
            else:
                parameter.normal_(0.0, 0.1)
    return model.eval()


def save_model(
    directory: Path,
    family: str = "qwen2",
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    shard: str = "5GB",
    tokenizer: bool = True,
    **fields: Any,
) -> PreTrainedModel:
    """Write such a model, and a tokenizer of single characters, to ``directory``; return the model."""
    model = build_model(family, dtype=dtype, seed=seed, **fields)
    model.save_pretrained(directory, max_shard_size=shard)
    if tokenizer:
        save_tokenizer(directory)
    return model


def save_tokenizer(directory: Path) -> None:
    vocabulary = {character: number for number, character in enumerate(ALPHABET)}
    characters = Tokenizer(models.WordLevel(vocabulary | {"?": len(vocabulary)}, unk_token="?"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def digests(output: Path) -> dict[str, str]:
    """The sha256 of every file below ``output``; of ``report.json`` without its record of times and host."""
    found = {}
    for path in sorted(output.rglob("*")):
        if path.is_file():
            data = path.read_bytes()
            if path.name == "report.json":
                report = json.loads(data)
                report.pop("run")
                data = json.dumps(report, sort_keys=True).encode()
            found[path.relative_to(output).as_posix()] = hashlib.sha256(data).hexdigest()
    return found


def file_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of every shard, through the reference implementation."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(path)
    return tensors


def rewrite_tensors(directory: Path, change: Mapping[str, Tensor | None]) -> None:
    """Replace (or, with ``None``, drop) tensors of a single-file model."""
    path = directory / "model.safetensors"
    tensors = {**load_file(path), **change}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path, {"format": "pt"})


class PlainBlock(nn.Module):
    """A residual block of two linears that nothing knows by name."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Plain(nn.Module):
    """A model that is no transformers model: blocks in a ModuleList between two other linears."""

    def __init__(self, width: int = 32, blocks: int = 3, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.embed = nn.Linear(8, width)
        self.blocks = nn.ModuleList(PlainBlock(width) for _ in range(blocks))
        self.head = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)
