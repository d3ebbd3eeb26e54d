"""The weights of a decoder as its native code takes them: operands, made once, one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from bitwright.core.errors import ArgumentError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme
from bitwright.kernels import native
from bitwright.kernels.arena import Arena
from bitwright.kernels.native_decoder import Block, Dense, PackedFloats, float_bytes, pack_floats, resident_bytes
from bitwright.kernels.records import KernelSpec, PackedWeight
from bitwright.models.decoder import DecoderShape
from bitwright.models.quantized import QuantizedLinear

if TYPE_CHECKING:
    from bitwright.models.hf import PreTrainedModel

__all__ = [
    "EMBEDDING",
    "HEAD",
    "LAYERS",
    "MOST_COLUMNS",
    "DecoderWeights",
    "ModelSource",
    "Rows",
    "WeightSource",
    "exact",
    "layer_dense",
    "pack_decoder",
    "pack_rows",
    "refuse_head",
]

LAYERS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
MOST_COLUMNS = 65536  # of a float weight
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
ROWS = 2048  # of a large weight that are packed at a time; whole panels


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderWeights:
    """All operands of a decoder.

    Attributes:
        dtype: of the model, and so of keys and values; products are exact for float32.
        embedding: ``[vocabulary, hidden]``, or the head's own operand, from which rows are read.
    """

    shape: DecoderShape
    dtype: torch.dtype
    blocks: tuple[Block, ...]
    embedding: Tensor | PackedWeight | PackedFloats
    final_norm: Tensor
    head: Dense

    def denses(self) -> Iterator[Dense]:
        """The head, and every layer of every block."""
        yield self.head
        for block in self.blocks:
            yield from (getattr(block, name) for name in LAYERS)

    def bytes(self) -> int:
        """How much memory they take, without norms and biases."""
        size = sum(resident_bytes(dense.weight) for dense in self.denses())
        return size + (self.embedding.nbytes if isinstance(self.embedding, Tensor) else 0)


@dataclass(frozen=True, slots=True)
class Rows:
    """A float weight ``shape [out, in]`` that is read some rows at a time: ``read(first, end)``."""

    shape: tuple[int, int]
    dtype: torch.dtype
    read: Callable[[int, int], Tensor]


class WeightSource(Protocol):
    """Where the weights come from, by the names of modules; each is asked for once."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def arena(self) -> Arena: ...

    def dense(self, name: str) -> Dense:
        """A linear layer, packed."""
        ...

    def vector(self, name: str) -> Tensor | None:
        """The parameter of this name, float32; ``None`` if the model has none."""
        ...

    def head_rows(self) -> Rows | None:
        """The weight of the output head, if it is float."""
        ...

    def embedding(self) -> Tensor:
        """The weight of the embedding, contiguous."""
        ...

    def end_head(self, *, keep_embedding: bool) -> None:
        """The head is packed."""


def pack_decoder(shape: DecoderShape, source: WeightSource, head: LayerScheme | None) -> DecoderWeights:
    """All weights of a model; ``head``: the scheme in which a float output head is rounded.

    Raises:
        ArgumentError: BW201 if the head cannot be stored so.
    """
    rows = None if head is None else source.head_rows()
    if rows is None or head is None:
        packed_head = source.dense(HEAD)
    else:
        reason = refuse_head(head, rows.shape)
        if reason is not None:
            what = f"the output head cannot be stored as {head.name}: {reason}"
            raise ArgumentError("BW201", what, suggestion="w8, or leave the head as it is")
        packed_head = Dense(weight=pack_rows(rows, head, source.arena), bias=source.vector(f"{HEAD}.bias"))
    embedding = packed_head.weight if shape.tied else source.embedding()
    source.end_head(keep_embedding=not shape.tied)
    norm = source.vector("model.norm.weight")
    assert norm is not None
    blocks = tuple(_block(source, f"model.layers.{number}", window) for number, window in enumerate(shape.windows))
    return DecoderWeights(
        shape=shape, dtype=source.dtype, blocks=blocks, embedding=embedding, final_norm=norm, head=packed_head
    )


def refuse_head(scheme: LayerScheme, shape: tuple[int, int]) -> str | None:
    """Why a head of this shape cannot be stored so, or ``None``."""
    reason = native.refuse(KernelSpec(scheme=scheme, shape=shape, device=torch.device("cpu")))
    return reason or ("double quantization" if scheme.weight.scale_scheme is not None else None)


def pack_rows(rows: Rows, scheme: LayerScheme | None, arena: Arena) -> PackedWeight | PackedFloats:
    """The operand of a float weight, rounded to nearest in ``scheme`` or as it is, some rows at a time.

    Rows of an operand lie in panels, one after the other, so that operands of whole panels make up that of all rows.
    """
    # Room for all of them before anything is read: what stays would make holes among what goes.
    size = float_bytes(rows.shape, rows.dtype) if scheme is None else native.codes_bytes(scheme.weight, rows.shape)
    codes, position, others = arena.room(size), 0, list[dict[str, Tensor]]()
    bits = 0

    def room(size: int) -> Tensor:
        nonlocal position
        position += size
        return codes[position - size : position]

    for first in range(0, rows.shape[0], ROWS):
        piece = rows.read(first, min(first + ROWS, rows.shape[0]))
        if scheme is None:
            made = pack_floats(piece, room)
            tensors, bits = {"codes": made.codes, "scale": made.scale}, made.bits
        else:
            quantized = QuantizedTensor.quantize(piece.to(torch.float32), scheme.weight)
            tensors = dict(native.pack(quantized, scheme, room).tensors)
        del tensors["codes"]
        others.append(tensors)
    joined = {name: arena.keep(torch.cat([tensors[name] for tensors in others])) for name in others[0]}
    if scheme is None:
        return PackedFloats(rows.shape, bits, codes, joined["scale"])
    return PackedWeight(scheme=scheme, shape=rows.shape, tensors={"codes": codes, **joined})


def _block(source: WeightSource, name: str, window: int) -> Block:
    layers = {layer: source.dense(f"{name}.{path}") for layer, path in LAYERS.items()}
    for layer, first in (("key", "query"), ("value", "query"), ("up", "gate")):
        layers[layer] = _share_scale(layers[layer], layers[first])
    attention = source.vector(f"{name}.input_layernorm.weight")
    mlp = source.vector(f"{name}.post_attention_layernorm.weight")
    assert attention is not None and mlp is not None
    return Block(
        attention_norm=attention, mlp_norm=mlp, query_norm=source.vector(f"{name}.self_attn.q_norm.weight"),
        key_norm=source.vector(f"{name}.self_attn.k_norm.weight"), window=window, **layers,
    )  # fmt: skip


def _share_scale(dense: Dense, other: Dense) -> Dense:
    """``dense`` with the other's input scale, if they are equal: inputs are then scaled and rounded once for both."""
    one, two = dense.input_scale, other.input_scale
    if one is None or two is None or one is two or not torch.equal(one, two):
        return dense
    return Dense(weight=dense.weight, bias=dense.bias, input_scale=two)


class ModelSource:
    """The weights of a loaded model. Quantized layers are shared with it.

    Float ones are packed anew: with ``release`` the model lets go of each as soon as it is packed, and cannot be run
    itself any more.
    """

    def __init__(self, model: PreTrainedModel, *, release: bool) -> None:
        self._model, self._release, self.arena = model, release, Arena()
        embedding = model.get_input_embeddings()
        assert isinstance(embedding, nn.Embedding)
        self._embedding = embedding

    @property
    def dtype(self) -> torch.dtype:
        return self._embedding.weight.dtype

    def dense(self, name: str) -> Dense:
        layer = self._head() if name == HEAD else self._model.get_submodule(name)
        dense = layer_dense(layer, self.arena)
        if self._release and isinstance(layer, nn.Linear) and name != HEAD:
            _empty(layer)
        return dense

    def vector(self, name: str) -> Tensor | None:
        holder, _, leaf = name.rpartition(".")
        try:
            module = self._head() if holder == HEAD else self._model.get_submodule(holder)
        except AttributeError:
            return None
        found = getattr(module, leaf, None)
        return None if found is None else exact(found)

    def head_rows(self) -> Rows | None:
        layer = self._head()
        return _rows_of(layer.weight) if isinstance(layer, nn.Linear) else None

    def embedding(self) -> Tensor:
        return self._embedding.weight.detach().contiguous()

    def end_head(self, *, keep_embedding: bool) -> None:
        head = self._head()
        if self._release and isinstance(head, nn.Linear):
            _empty(head)
        if self._release and not keep_embedding:
            _empty(self._embedding)

    def _head(self) -> nn.Module:
        found: Any = self._model
        head = found.get_output_embeddings()
        assert isinstance(head, nn.Module)
        return head


def layer_dense(layer: nn.Module, arena: Arena) -> Dense:
    """A layer of a model, packed; what is packed anew lies in ``arena``."""
    assert isinstance(layer, QuantizedLinear | nn.Linear)
    bias = None if layer.bias is None else exact(layer.bias)
    if isinstance(layer, QuantizedLinear):
        return Dense(weight=layer.packed, bias=bias, input_scale=layer.input_scale)
    return Dense(weight=pack_rows(_rows_of(layer.weight), None, arena), bias=bias)


def exact(vector: Tensor) -> Tensor:
    """A vector in float32, on the CPU."""
    return vector.detach().to("cpu", torch.float32).contiguous()


def _rows_of(weight: Tensor) -> Rows:
    whole = weight.detach()
    return Rows((whole.shape[0], whole.shape[1]), whole.dtype, lambda first, end: whole[first:end])


def _empty(layer: Any) -> None:
    layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)
