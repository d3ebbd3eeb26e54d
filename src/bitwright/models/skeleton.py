"""The modules of a dense decoder by name and shape, without numbers and without the code that would run them.

Whatever matches the names and shapes of files to a model's works on it as on a model of transformers, whose names it
has; building it takes milliseconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bitwright.models.plain_config import PlainConfig

__all__ = ["Skeleton"]


class Skeleton(nn.Module):
    """A causal language model of one of the families of :mod:`bitwright.models.decoder`, on the meta device.

    Attributes:
        config: as it was given.
        generation_config: ``None``, until the file of that name is read.
    """

    base_model_prefix = "model"

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.config = config
        self.generation_config: Any = None
        self.model = _Part()
        self.model.embed_tokens = _Rows(config.vocab_size, config.hidden_size, config.dtype)
        self.model.layers = nn.ModuleList(_block(config) for _ in range(config.num_hidden_layers))
        self.model.norm = _Norm(config.hidden_size, config.dtype)
        self.model.rotary_emb = _Part()
        self.model.rotary_emb.rope_type = config.rope_type
        self.model.rotary_emb.inv_freq = config.inverse_frequencies
        self.model.rotary_emb.attention_scaling = 1.0
        self.lm_head = _Product(config.hidden_size, config.vocab_size, bias=False, dtype=config.dtype)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


class _Part(nn.Module):
    """A module that only has others."""

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: Any


class _Product(nn.Linear):
    """A linear layer that was never filled: torch would draw numbers for it, also on the meta device."""

    def __init__(self, columns: int, rows: int, *, bias: bool, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = columns, rows
        self.weight = _vacant(dtype, rows, columns)
        self.register_parameter("bias", _vacant(dtype, rows) if bias else None)


class _Rows(nn.Embedding):
    def __init__(self, rows: int, columns: int, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = rows, columns
        self.weight = _vacant(dtype, rows, columns)


class _Norm(nn.Module):
    def __init__(self, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = _vacant(dtype, width)


def _vacant(dtype: torch.dtype, *shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def _block(config: PlainConfig) -> nn.Module:
    dtype, hidden, inner = config.dtype, config.hidden_size, config.intermediate_size
    queries, keys = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    attention: Any = nn.Module()
    attention.q_proj = _Product(hidden, queries, bias=config.qkv_bias, dtype=dtype)
    attention.k_proj = _Product(hidden, keys, bias=config.qkv_bias, dtype=dtype)
    attention.v_proj = _Product(hidden, keys, bias=config.qkv_bias, dtype=dtype)
    attention.o_proj = _Product(queries, hidden, bias=config.output_bias, dtype=dtype)
    if config.model_type == "qwen3":
        attention.q_norm, attention.k_norm = _Norm(config.head_dim, dtype), _Norm(config.head_dim, dtype)
    mlp: Any = nn.Module()
    mlp.gate_proj = _Product(hidden, inner, bias=config.mlp_bias, dtype=dtype)
    mlp.up_proj = _Product(hidden, inner, bias=config.mlp_bias, dtype=dtype)
    mlp.down_proj = _Product(inner, hidden, bias=config.mlp_bias, dtype=dtype)
    block: Any = nn.Module()
    block.self_attn, block.mlp = attention, mlp
    block.input_layernorm, block.post_attention_layernorm = _Norm(hidden, dtype), _Norm(hidden, dtype)
    made: nn.Module = block
    return made
