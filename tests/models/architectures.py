"""Tiny models of every family that is promised, built with fixed seeds: what laws about architectures are tested on.

Widths are chosen to catch mistakes: key/value heads are fewer than heads where a family allows it, the hidden width of
``llama48`` is no power of two, weights of norms and biases are far from their trivial values, and a few channels of the
norms are large, as in trained models, so that equalizing pays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

__all__ = ["ARCHITECTURES", "MIXTURE", "Experts", "build", "sample_ids"]

VOCABULARY = 80
MIXTURE = "mixture"  # of experts in a ModuleList, as Mixtral's once were: no family of transformers has them any more
_ROTARY: dict[str, Any] = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128,
}  # fmt: skip
_GPT: dict[str, Any] = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": VOCABULARY}
_IDS: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": None}

# name -> (model type, fields of its configuration); every linear of a block reads 48, 64, 96, 128 or 256 features.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _ROTARY),
    "llama48": ("llama", _ROTARY | {"hidden_size": 48, "intermediate_size": 96}),
    "qwen2": ("qwen2", _ROTARY),
    "qwen3": ("qwen3", _ROTARY | {"head_dim": 32}),
    "mistral": ("mistral", _ROTARY | {"head_dim": 16, "sliding_window": 8}),
    "gemma": ("gemma", _ROTARY | {"head_dim": 16}),
    "gemma2": ("gemma2", _ROTARY | {"head_dim": 16, "sliding_window": 8}),
    "phi": ("phi", _ROTARY | {"num_key_value_heads": 4}),
    "phi3": ("phi3", _ROTARY | {"pad_token_id": 0}),
    "gpt2": ("gpt2", _GPT),
    "gptj": ("gptj", _GPT | {"rotary_dim": 8}),
    "gpt_neox": ("gpt_neox", _ROTARY),
    "gpt_neox_sequential": ("gpt_neox", _ROTARY | {"use_parallel_residual": False}),
    "opt": ("opt", _ROTARY | {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    MIXTURE: ("llama", _ROTARY),
}


class Experts(nn.Module):
    """A gated sum of MLPs in a ModuleList: each token goes to its ``top`` experts of ``count``."""

    def __init__(self, experts: list[nn.Module], width: int, top: int = 2) -> None:
        super().__init__()
        self.gate = nn.Linear(width, len(experts), bias=False)
        self.experts = nn.ModuleList(experts)
        self.top = top

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.reshape(-1, hidden.shape[-1])
        chances, chosen = self.gate(tokens).softmax(-1).topk(self.top, dim=-1)
        output = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            rows, slot = torch.where(chosen == number)
            if rows.numel():  # an expert that no token chose is not run
                output.index_add_(0, rows, expert(tokens[rows]) * chances[rows, slot, None])
        return output.view_as(hidden)


def build(
    name: str, *, dtype: torch.dtype = torch.float32, tied: bool = False, seed: int = 0, **fields: Any
) -> PreTrainedModel:
    """The tiny model ``name`` of ``ARCHITECTURES`` with random weights, in evaluation mode.

    ``tied``: the output head shares the embedding's weight. ``fields`` replace those of the configuration. The same
    arguments give the same numbers; those of another dtype are the float32 ones, rounded.
    """
    family, own = ARCHITECTURES[name]
    config = AutoConfig.for_model(family, **{**own, **_IDS, "tie_word_embeddings": tied, **fields})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if name == MIXTURE:
        for layer in model.model.layers:
            experts = [type(layer.mlp)(config) for _ in range(4)]
            layer.mlp = Experts(experts, config.hidden_size)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for leaf, parameter in module.named_parameters(recurse=False):
                _fill(parameter, leaf, "gemma" in family, generator)
    return model.to(dtype).eval()


def _fill(parameter: nn.Parameter, leaf: str, from_one: bool, generator: torch.Generator) -> None:
    noise = torch.empty(parameter.shape).normal_(generator=generator)
    if parameter.dim() >= 2:
        parameter.copy_(noise * (0.3 if parameter.shape[0] == VOCABULARY else 0.15))
    elif leaf == "weight":  # of a norm; Gemma's multiply by one more than they hold
        scale = 1 + 0.1 * noise
        scale[::17] *= 5
        parameter.copy_(scale - 1 if from_one else scale)
    else:
        parameter.copy_(0.1 * noise)


def sample_ids(count: int = 2, length: int = 24, seed: int = 0) -> Tensor:
    """Token ids ``[count, length]`` for every architecture."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (count, length), generator=generator)
