"""What a decoder is to the engine: one step over several sequences, whose keys and values are kept in pages.

Two runners take and give exactly these records: one runs the model's own modules in torch, one calls native code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from bitwright.core.kv_scheme import KVScheme
from bitwright.models.hf import context_length
from bitwright.models.paged_cache import PagedCache

if TYPE_CHECKING:
    from bitwright.models.hf import PreTrainedModel

__all__ = ["FAMILIES", "Decoder", "DecoderShape", "Step", "read_shape", "refuse_architecture"]

# Model types whose blocks are: norm, attention with rotary positions, norm, gated MLP; both with a residual around.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Rotary positions whose frequencies are the same at every length of the context.
FIXED_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderShape:
    """The sizes and constants of a dense decoder.

    Attributes:
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocabulary: sizes; ``heads`` is a multiple of
            ``kv_heads``, and head ``h`` of the queries reads head ``h // (heads / kv_heads)`` of keys and values.
        norm_epsilon: of every root mean square norm.
        inverse_frequencies: of the rotary positions, float32 ``[head_dim / 2]``.
        attention_factor: by which cosines and sines are multiplied.
        positions: how long a context the model was made for.
        windows: for each layer how many positions, its own included, a token sees; 0 for all.
        qk_norm: whether queries and keys have norms of their own, over each head.
        tied: whether the output head shares the embedding's weight.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    norm_epsilon: float
    inverse_frequencies: Tensor
    attention_factor: float
    positions: int
    windows: tuple[int, ...]
    qk_norm: bool
    tied: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One engine step: several sequences, each with one or more new tokens. CPU tensors, contiguous.

    Attributes:
        tokens: int64 ``[n]``, the new tokens, sequence after sequence.
        positions: int32 ``[n]``, ascending by one within a sequence.
        starts: int32 ``[sequences + 1]``, where each sequence's tokens begin in ``tokens``.
        lengths: int32 ``[sequences]``, of the context after this step.
        pages: int32 ``[sequences, most pages]``, where each sequence's keys and values lie; unused entries are 0.
        outputs: int32 ``[m]``, ascending: which of the ``n`` rows want logits; perhaps none.
    """

    tokens: Tensor
    positions: Tensor
    starts: Tensor
    lengths: Tensor
    pages: Tensor
    outputs: Tensor


class Decoder(Protocol):
    """What runs a step. A row's logits depend neither on the other sequences, nor on how its context was cut into
    steps, nor on which pages it lies in."""

    @property
    def shape(self) -> DecoderShape: ...

    def new_cache(self, page_count: int, scheme: KVScheme | None = None) -> PagedCache:
        """Room for ``page_count`` pages of keys and values, stored as ``scheme`` says (``None``: as computed)."""
        ...

    def forward(self, step: Step, cache: PagedCache) -> Tensor:
        """Logits, float32 ``[m, vocabulary]``; writes the new keys (after rotation) and values into the pages."""
        ...

    def weight_bytes(self) -> int:
        """How much memory the weights take."""
        ...


def refuse_architecture(model: PreTrainedModel) -> str | None:
    """Why no decoder can run ``model``, or ``None``: by what its configuration and its modules are."""
    config = model.config
    if config.model_type not in FAMILIES:
        return f"models of type {config.model_type!r} are not supported, only {', '.join(FAMILIES)}"
    rotary = getattr(model.model, "rotary_emb", None)
    kind = getattr(rotary, "rope_type", None)
    if kind not in FIXED_ROPE:
        return f"rotary positions of type {kind!r} are not supported, only {', '.join(FIXED_ROPE)}"
    if not isinstance(getattr(rotary, "inv_freq", None), Tensor):
        return "the rotary positions of this transformers have no inverse frequencies"
    if any(parameter.is_meta for parameter in model.parameters()):
        return "the model has parameters without values (on the meta device)"
    return None


def read_shape(model: Any) -> DecoderShape:
    """The shape of a model, or of its skeleton, that :func:`refuse_architecture` does not refuse."""
    config: Any = model.config
    rotary: Any = model.model.rotary_emb
    embedding = model.get_input_embeddings()
    assert isinstance(embedding, nn.Embedding)
    first = model.model.layers[0].self_attn
    frequencies = rotary.inv_freq.to("cpu", torch.float32).contiguous()
    return DecoderShape(
        layers=len(model.model.layers),
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=2 * frequencies.shape[0],
        vocabulary=embedding.num_embeddings,
        norm_epsilon=float(config.rms_norm_eps),
        inverse_frequencies=frequencies,
        attention_factor=float(rotary.attention_scaling),
        positions=context_length(config) or 1 << 30,
        windows=_windows(config, len(model.model.layers)),
        qk_norm=hasattr(first, "q_norm"),
        tied=getattr(model.lm_head, "weight", None) is embedding.weight,
    )


def _windows(config: Any, layers: int) -> tuple[int, ...]:
    """How far back each layer sees, as transformers reads the configuration."""
    window = getattr(config, "sliding_window", None) or 0
    if config.model_type == "mistral":
        return (window,) * layers
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * layers
    return tuple(window if kind == "sliding_attention" else 0 for kind in kinds)
