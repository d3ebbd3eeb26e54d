"""First weights with two attention heads in place, so that copying need not be discovered.

A small model spends most of a short run before it finds out that it can look back (Olsson et al.
2022, "In-context Learning and Induction Heads"). Here layer 0 begins with heads that read the
tokens one and two places back, and layer 1 with a head that looks for the place where the same
two tokens stood before and says what followed. All of it is trained like everything else.
"""

from __future__ import annotations

import math

import torch
from transformers import Qwen2ForCausalLM

HEAD = 64
NEAR_PAIRS = 11  # the fast RoPE pairs tell places apart; the slow rest carries content
SHARPNESS = 7.0
MATCH = 4.0
WRITE = 0.05
COPY = 0.3


def frequencies(theta: float) -> torch.Tensor:
    """Return the angle per place of each pair of a head's dimensions, [32]."""
    exponents = -torch.arange(0, HEAD, 2, dtype=torch.float32) / HEAD
    angles: torch.Tensor = torch.pow(theta, exponents)
    return angles


def orthonormal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Return a random matrix [rows, columns] with orthonormal rows."""
    square = torch.randn(columns, rows, generator=generator)
    basis: torch.Tensor = torch.linalg.qr(square).Q
    return basis.T.contiguous()


def look_back(model: Qwen2ForCausalLM, theta: float) -> None:
    """Set biases so that heads 0 and 1 of layer 0 attend one and two places back."""
    attention = model.model.layers[0].self_attn
    angles = frequencies(theta)[:NEAR_PAIRS]
    attention.k_proj.bias[:NEAR_PAIRS] = SHARPNESS
    for head, places in enumerate((1, 2)):
        bias = attention.q_proj.bias[head * HEAD : (head + 1) * HEAD]
        bias[:NEAR_PAIRS] = SHARPNESS * torch.cos(places * angles)
        bias[HEAD // 2 : HEAD // 2 + NEAR_PAIRS] = -SHARPNESS * torch.sin(places * angles)


def seed_heads(model: Qwen2ForCausalLM, theta: float, seed: int) -> None:
    """Write the look-back heads and the matching head into a model's first weights, in place."""
    generator = torch.Generator().manual_seed(seed)
    hidden = model.config.hidden_size
    if hidden < 4 * HEAD or len(model.model.layers) < 2:
        return  # too narrow for the three subspaces below
    subspaces = orthonormal(4 * HEAD, hidden, generator)
    read, one_back, two_back, spoken = subspaces.view(4, HEAD, hidden)  # each [64, hidden]
    content = list(range(NEAR_PAIRS, HEAD // 2))
    content += [pair + HEAD // 2 for pair in content]
    first, second = torch.tensor(content[0::2]), torch.tensor(content[1::2])
    with torch.no_grad():
        look_back(model, theta)
        back, match = (model.model.layers[index].self_attn for index in (0, 1))
        back.v_proj.weight[:HEAD] = read
        back.o_proj.weight[:, :HEAD] = WRITE * one_back.T
        back.o_proj.weight[:, HEAD : 2 * HEAD] = WRITE * two_back.T
        scale = MATCH / math.sqrt(2)
        match.q_proj.weight[first] = scale * read[first]
        match.k_proj.weight[first] = scale * one_back[first]
        match.q_proj.weight[second] = scale * one_back[second]
        match.k_proj.weight[second] = scale * two_back[second]
        match.v_proj.weight[:HEAD] = spoken
        match.o_proj.weight[:, :HEAD] = COPY * spoken.T
