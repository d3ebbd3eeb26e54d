"""All layers of a dense decoder in one native call: records of addresses, made once. See ``bw_decode_step``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bitwright.kernels import native, native_library
from bitwright.kernels.arena import Room, shared_room
from bitwright.kernels.native_pages import Batch, Pages
from bitwright.kernels.records import PackedWeight

if native_library.missing() is None:
    from bitwright.kernels import _native

__all__ = [
    "Block",
    "Dense",
    "NativeStack",
    "PackedFloats",
    "StackShape",
    "float_bytes",
    "look_up",
    "pack_floats",
    "resident_bytes",
]


@dataclass(frozen=True, slots=True)
class PackedFloats:
    """A float weight ``[out, in]`` in panels of 64 rows: bfloat16 as it was, anything else as float32."""

    shape: tuple[int, int]
    bits: int
    codes: Tensor
    scale: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Dense:
    """A linear layer: its operand, float32 ``bias [out]`` and ``input_scale [in]``."""

    weight: PackedWeight | PackedFloats
    bias: Tensor | None = None
    input_scale: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """A block's norms (float32 ``[hidden]``; of heads ``[dimension]``, or ``None``) and layers."""

    attention_norm: Tensor
    mlp_norm: Tensor
    query_norm: Tensor | None
    key_norm: Tensor | None
    query: Dense
    key: Dense
    value: Dense
    output: Dense
    gate: Dense
    up: Dense
    down: Dense
    window: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StackShape:
    """Sizes and constants; see ``bw_decoder``."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    dimension: int
    vocabulary: int
    epsilon: float
    are_halves: bool


def float_bytes(shape: tuple[int, int], dtype: torch.dtype) -> int:
    """What the codes of a float weight ``[out, in]`` take in its operand."""
    slots = -(-shape[1] // native.BLOCK) * native.BLOCK
    return _native.codes_bytes(shape[0], slots, 16 if dtype == torch.bfloat16 else 32)


def pack_floats(weight: Tensor, room: Room = shared_room) -> PackedFloats:
    """The operand of a float weight ``[out, in]``, without loss: bfloat16 stays, float32 and float16 become float32.

    Its codes lie in ``room``.
    """
    rows, columns = weight.shape
    bits = 16 if weight.dtype == torch.bfloat16 else 32
    source = weight.detach().contiguous()
    if source.dtype not in native.DTYPES:
        raise ValueError(f"a weight of {weight.dtype}")
    slots = -(-columns // native.BLOCK) * native.BLOCK
    codes = room(float_bytes((rows, columns), weight.dtype))
    _native.pack_floats(
        source.data_ptr(), native.DTYPES[source.dtype], rows, columns, slots, bits, codes.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    groups = -(-slots // min(slots, native.MAX_GROUP))
    scale = torch.ones((-(-rows // native.PANEL), groups, native.PANEL), dtype=torch.float32)
    return PackedFloats((rows, columns), bits, codes, scale)


def look_up(weight: PackedWeight | PackedFloats, ids: Tensor) -> Tensor:
    """Rows ``ids`` (int64 ``[n]``) of a packed weight, float32 ``[n, in]``.

    Raises:
        ValueError: if ``ids`` are not such, or there is no such row.
    """
    if ids.dtype != torch.int64 or ids.dim() != 1 or not ids.is_contiguous() or ids.device.type != "cpu":
        raise ValueError(f"ids: {ids.dtype} {list(ids.shape)} on {ids.device}; int64 [n] on the CPU is called for")
    y = torch.empty(ids.numel(), weight.shape[1], dtype=torch.float32)
    _native.look_up(_record(weight), ids.data_ptr(), ids.numel(), y.data_ptr(), torch.get_num_threads())
    return y


def resident_bytes(weight: PackedWeight | PackedFloats) -> int:
    """The bytes that an operand takes."""
    tensors = [weight.codes, weight.scale] if isinstance(weight, PackedFloats) else weight.tensors.values()
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class NativeStack:
    """Blocks, embedding, last norm and head as one native record; keeps every tensor alive that it points to.

    Args:
        embedding: float ``[vocabulary, hidden]``, or an operand, whose rows are then read.
        final_norm: float32 ``[hidden]``.

    Raises:
        ValueError: if a tensor has not the size that the shape calls for.
    """

    def __init__(
        self,
        shape: StackShape,
        blocks: Sequence[Block],
        embedding: Tensor | PackedWeight | PackedFloats,
        final_norm: Tensor,
        head: Dense,
    ) -> None:
        native_library.instruction_set()
        self._kept = (tuple(blocks), embedding, final_norm, head)
        self._layers = [_layer(block, shape) for block in blocks]
        self._stack = _native.Decoder(self._layers, _dense(head))
        self._stack.set_sizes(
            shape.hidden, shape.intermediate, shape.heads, shape.kv_heads, shape.dimension, shape.vocabulary,
            shape.epsilon, shape.dimension**-0.5, shape.are_halves,
        )  # fmt: skip
        norm = _vector(final_norm, shape.hidden)
        if isinstance(embedding, Tensor):
            if embedding.shape != (shape.vocabulary, shape.hidden) or not embedding.is_contiguous():
                raise ValueError(f"an embedding of {list(embedding.shape)}")
            self._stack.set_ends(None, embedding.data_ptr(), native.DTYPES[embedding.dtype], norm)
        else:
            self._stack.set_ends(_record(embedding), 0, 0, norm)
        self._vocabulary, self._half = shape.vocabulary, shape.dimension // 2

    def step(
        self, ids: Tensor, batch: Batch, outputs: Tensor, cosine: Tensor, sine: Tensor, pages: Sequence[Pages]
    ) -> Tensor:
        """Logits, float32 ``[outputs, vocabulary]``; ids int64, outputs int32, angles float32 ``[positions, half]``.

        Raises:
            ValueError: if the batch does not fit the pages or the model.
        """
        logits = torch.empty(outputs.numel(), self._vocabulary, dtype=torch.float32)
        are_sound = ids.dtype == torch.int64 and ids.shape == batch.positions.shape and outputs.dtype == torch.int32
        are_sound &= all(angles.dtype == torch.float32 and angles.is_contiguous() for angles in (cosine, sine))
        are_sound &= cosine.shape == sine.shape and cosine.dim() == 2 and cosine.shape[1] == self._half
        if not are_sound or not ids.is_contiguous() or not outputs.is_contiguous():
            raise ValueError("ids are int64 [n], outputs int32 [m], angles float32 [positions, dimension / 2]")
        self._stack.step(
            batch.record(), ids.data_ptr(), outputs.data_ptr(), outputs.numel(), cosine.data_ptr(), sine.data_ptr(),
            cosine.shape[0], [each.record for each in pages], logits.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        return logits


def _record(weight: PackedWeight | PackedFloats) -> _native.Weight:
    if isinstance(weight, PackedWeight):
        return native.record(weight)
    rows, columns = weight.shape
    slots = -(-columns // native.BLOCK) * native.BLOCK
    group = min(slots, native.MAX_GROUP)
    return _native.Weight(
        rows, columns, slots, group, weight.bits, 0, 0, weight.codes.data_ptr(), weight.scale.data_ptr(), 0, 0, 0, 0
    )


def _dense(dense: Dense) -> _native.Dense:
    weight = dense.weight
    rounding = native.rounding(weight) if isinstance(weight, PackedWeight) else (16, 0)
    rows, columns = weight.shape
    bias = 0 if dense.bias is None else _vector(dense.bias, rows)
    input_scale = 0 if dense.input_scale is None else _vector(dense.input_scale, columns)
    return _native.Dense(_record(weight), bias, input_scale, *rounding)


def _layer(block: Block, shape: StackShape) -> _native.Layer:
    first, second = _vector(block.attention_norm, shape.hidden), _vector(block.mlp_norm, shape.hidden)
    query, key = (0 if norm is None else _vector(norm, shape.dimension) for norm in (block.query_norm, block.key_norm))
    return _native.Layer(
        first, second, query, key, _dense(block.query), _dense(block.key), _dense(block.value), _dense(block.output),
        _dense(block.gate), _dense(block.up), _dense(block.down), block.window,
    )  # fmt: skip


def _vector(vector: Tensor, size: int) -> int:
    """The address of a float32 vector of that size."""
    if vector.dtype != torch.float32 or vector.shape != (size,) or not vector.is_contiguous():
        raise ValueError(f"a vector of {vector.dtype} {list(vector.shape)}; float32 [{size}] is called for")
    return vector.data_ptr()
