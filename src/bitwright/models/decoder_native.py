"""The fast decoder: a loaded model's weights, and one native call for all layers of a step.

Between products everything is float32. If the model is of a 16-bit dtype, activations of 16 bits are 16-bit integers
where weights are codes, with a scale for each token (closer than bfloat16, and as fast as integers), and bfloat16 where
weights are bfloat16. In a float32 model they stay float32.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bitwright.core.errors import ArgumentError
from bitwright.core.kv_scheme import KVCode, KVScheme
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme, QuantScheme
from bitwright.kernels import native, native_library
from bitwright.kernels.native_decoder import (
    Block,
    Dense,
    NativeStack,
    PackedFloats,
    StackShape,
    pack_floats,
    resident_bytes,
)
from bitwright.kernels.native_pages import MOST_DIMENSION, Batch, Pages
from bitwright.kernels.records import KernelSpec, PackedWeight
from bitwright.models.decoder import Step, read_shape, refuse_architecture
from bitwright.models.hf import PreTrainedModel
from bitwright.models.paged_cache import CacheShape, PagedCache
from bitwright.models.quantized import QuantizedLinear

__all__ = ["NativeDecoder", "refuse", "refuse_cache"]

LAYERS = {
    "query": "self_attn.q_proj",
    "key": "self_attn.k_proj",
    "value": "self_attn.v_proj",
    "output": "self_attn.o_proj",
    "gate": "mlp.gate_proj",
    "up": "mlp.up_proj",
    "down": "mlp.down_proj",
}
FIRST_POSITIONS = 1024  # whose angles are computed at once; more when a text is longer
MOST_COLUMNS = 65536  # of a float weight


def refuse(model: PreTrainedModel) -> str | None:
    """Why this decoder cannot run ``model``, or ``None``."""
    reason = native_library.missing() or refuse_architecture(model)
    if reason is not None:
        return reason
    if any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return "runs on the CPU"
    config: Any = model.config
    if config.hidden_act not in ("silu", "swish"):
        return f"activations of type {config.hidden_act!r} are not supported, only silu"
    shape = read_shape(model)
    if shape.head_dim % 2 or shape.head_dim > MOST_DIMENSION or len(shape.inverse_frequencies) * 2 != shape.head_dim:
        return f"heads of {shape.head_dim} numbers are not supported"
    inner: Any = model.model
    for number, block in enumerate(inner.layers):
        for path in LAYERS.values():
            reason = _refuse_layer(block.get_submodule(path))
            if reason is not None:
                return f"layer {number}, {path}: {reason}"
    return _refuse_layer(_head_of(model))


def _refuse_layer(layer: nn.Module) -> str | None:
    if isinstance(layer, QuantizedLinear):
        return None if layer.kernel.name == native.KERNEL.name else f"is run by the {layer.kernel.name} kernel"
    if not isinstance(layer, nn.Linear):
        return f"is a {type(layer).__name__}"
    if layer.weight.dtype not in native.DTYPES or layer.in_features > MOST_COLUMNS:
        return f"has a weight of {layer.weight.dtype} {list(layer.weight.shape)}"
    return None


def refuse_cache(scheme: KVScheme, head_dim: int) -> str | None:
    """Why this decoder cannot keep keys and values so, or ``None``."""
    for each in (scheme, *scheme.overrides.values()):
        codes = (each.key, each.value)
        if all(code.is_float for code in codes):
            continue
        bits = tuple(code.bits for code in codes)
        if not all(_is_own(code) for code in codes) or bits not in ((8, 8), (4, 4), (8, 4)):
            return f"keys as {each.key.name} and values as {each.value.name} are not supported"
        if head_dim * min(code.bits for code in codes) % 8:
            return f"a head of {head_dim} numbers is an odd number of 4-bit codes"
    return None


def _is_own(code: KVCode) -> bool:
    """Whether these are asymmetric integers whose scale belongs to one token and head."""
    return code.kind == "int" and code.grain == "token_head" and not code.symmetric and not code.group


class NativeDecoder:
    """Runs steps of ``model`` natively; a row's logits are the same in any company, bit for bit.

    Quantized layers are shared with the model. Float ones are packed anew: with ``release`` the model lets go of each
    as soon as it is packed, and cannot be run itself any more.

    Args:
        head: how the output head is stored: as it is, or rounded to nearest in this scheme, for instance
            ``parse("w8")``. Where the embedding shares its weight, it is read from there, too.
        release: see above.

    Raises:
        ArgumentError: BW201 if :func:`refuse` says why it cannot run the model, or the head cannot be stored so.
    """

    def __init__(self, model: PreTrainedModel, *, head: LayerScheme | None = None, release: bool = False) -> None:
        reason = refuse(model)
        if reason is not None:
            what = f"the model cannot be decoded natively: {reason}"
            raise ArgumentError("BW201", what, suggestion="bitwright.generate runs every model")
        self.shape = shape = read_shape(model)
        inner: Any = model.model
        embedding: nn.Embedding = inner.embed_tokens
        self._dtype = embedding.weight.dtype
        self._operands: list[PackedWeight | PackedFloats] = []
        packed_head = self._head(model, head)
        rows: Tensor | PackedWeight | PackedFloats = embedding.weight.detach().contiguous()
        if shape.tied:
            rows = packed_head.weight
        elif isinstance(rows, Tensor):
            self._embedding_bytes = rows.numel() * rows.element_size()
        if release:
            self._let_go(model, keep_embedding=not shape.tied)
        blocks = [self._block(block, shape.windows[number], release) for number, block in enumerate(inner.layers)]
        self._stack = NativeStack(
            StackShape(
                hidden=shape.hidden, intermediate=shape.intermediate, heads=shape.heads, kv_heads=shape.kv_heads,
                dimension=shape.head_dim, vocabulary=shape.vocabulary, epsilon=shape.norm_epsilon,
                are_halves=self._dtype != torch.float32,
            ),
            blocks, rows, _exact(inner.norm.weight), packed_head,
        )  # fmt: skip
        self._angles = self._turns(min(FIRST_POSITIONS, shape.positions))
        self._pages: WeakKeyDictionary[PagedCache, list[Pages]] = WeakKeyDictionary()

    _embedding_bytes = 0

    def new_cache(self, page_count: int, scheme: KVScheme | None = None) -> PagedCache:
        """Room for ``page_count`` pages; see :class:`bitwright.models.decoder.Decoder`.

        Raises:
            ArgumentError: BW201 if :func:`refuse_cache` says why it cannot be stored so.
        """
        reason = None if scheme is None else refuse_cache(scheme, self.shape.head_dim)
        if reason is not None:
            what = f"the native decoder cannot read such a cache: {reason}"
            raise ArgumentError("BW201", what, suggestion="int8 or int4, or the decoder in torch")
        shape = CacheShape(
            layers=self.shape.layers, kv_heads=self.shape.kv_heads, head_dim=self.shape.head_dim, dtype=self._dtype
        )
        return PagedCache(shape, page_count, scheme)

    def weight_bytes(self) -> int:
        """How much memory the weights take, without norms and biases."""
        return self._embedding_bytes + sum(resident_bytes(operand) for operand in self._operands)

    def forward(self, step: Step, cache: PagedCache) -> Tensor:
        """Logits of the rows ``step.outputs``, float32 ``[m, vocabulary]``.

        A token whose numbers are not finite makes the logits of its own sequence NaN, and no other's.

        Raises:
            ValueError: if the step does not fit the cache or the model.
        """
        longest = int(step.lengths.max()) if step.lengths.numel() else 0
        if longest > self._angles[0].shape[0]:
            self._angles = self._turns(max(longest, 2 * self._angles[0].shape[0]))
        batch = Batch(positions=step.positions, starts=step.starts, lengths=step.lengths, pages=step.pages)
        if cache not in self._pages:
            self._pages[cache] = [_pages(cache, layer) for layer in range(self.shape.layers)]
        return self._stack.step(step.tokens, batch, step.outputs, *self._angles, self._pages[cache])

    def _turns(self, positions: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 ``[positions, head_dim / 2]``."""
        angles = torch.arange(positions, dtype=torch.float32)[:, None] * self.shape.inverse_frequencies
        factor = self.shape.attention_factor
        return (angles.cos() * factor).contiguous(), (angles.sin() * factor).contiguous()

    def _head(self, model: PreTrainedModel, scheme: LayerScheme | None) -> Dense:
        layer = _head_of(model)
        if scheme is None or isinstance(layer, QuantizedLinear):
            return self._dense(layer)
        assert isinstance(layer, nn.Linear)
        spec = KernelSpec(scheme=scheme, shape=(layer.out_features, layer.in_features), device=torch.device("cpu"))
        reason = native.refuse(spec) or ("double quantization" if scheme.weight.scale_scheme is not None else None)
        if reason is not None:
            what = f"the output head cannot be stored as {scheme.name}: {reason}"
            raise ArgumentError("BW201", what, suggestion="w8, or leave the head as it is")
        weight = native.pack(_quantize_rows(layer.weight.detach(), scheme.weight), scheme)
        self._operands.append(weight)
        return Dense(weight=weight, bias=None if layer.bias is None else _exact(layer.bias))

    def _dense(self, layer: nn.Module) -> Dense:
        assert isinstance(layer, QuantizedLinear | nn.Linear)
        bias = None if layer.bias is None else _exact(layer.bias)
        if isinstance(layer, QuantizedLinear):
            dense = Dense(weight=layer.packed, bias=bias, input_scale=layer.input_scale)
        else:
            dense = Dense(weight=pack_floats(layer.weight), bias=bias)
        self._operands.append(dense.weight)
        return dense

    def _block(self, block: Any, window: int, release: bool) -> Block:
        layers = {}
        for name, path in LAYERS.items():
            layer = block.get_submodule(path)
            layers[name] = self._dense(layer)
            if release and isinstance(layer, nn.Linear):
                _empty(layer)
        for name, first in (("key", "query"), ("value", "query"), ("up", "gate")):
            layers[name] = _share_scale(layers[name], layers[first])
        norms = [getattr(block.self_attn, name, None) for name in ("q_norm", "k_norm")]
        heads = [None if norm is None else _exact(norm.weight) for norm in norms]
        return Block(
            attention_norm=_exact(block.input_layernorm.weight), mlp_norm=_exact(block.post_attention_layernorm.weight),
            query_norm=heads[0], key_norm=heads[1], window=window, **layers,
        )  # fmt: skip

    def _let_go(self, model: PreTrainedModel, *, keep_embedding: bool) -> None:
        head = _head_of(model)
        if isinstance(head, nn.Linear):
            _empty(head)
        if not keep_embedding:
            _empty(model.get_input_embeddings())


def _head_of(model: PreTrainedModel) -> nn.Module:
    found: Any = model
    head = found.get_output_embeddings()
    assert isinstance(head, nn.Module)
    return head


def _empty(layer: nn.Module) -> None:
    layer.weight = nn.Parameter(torch.empty(0), requires_grad=False)


def _exact(vector: Tensor) -> Tensor:
    return vector.detach().to("cpu", torch.float32).contiguous()


def _share_scale(dense: Dense, other: Dense) -> Dense:
    """``dense`` with the other's input scale, if they are equal: inputs are then scaled and rounded once for both."""
    one, two = dense.input_scale, other.input_scale
    if one is None or two is None or one is two or not torch.equal(one, two):
        return dense
    return Dense(weight=dense.weight, bias=dense.bias, input_scale=two)


def _quantize_rows(weight: Tensor, scheme: QuantScheme, rows: int = 8192) -> QuantizedTensor:
    """Round to nearest, some rows at a time: a float32 copy of a large head would be the peak of memory."""
    parts = [QuantizedTensor.quantize(part.to(torch.float32), scheme) for part in torch.split(weight, rows)]
    scales, zeros = [part.scale for part in parts], [part.zero for part in parts if part.zero is not None]
    assert all(isinstance(scale, Tensor) for scale in scales), "double quantization is refused before"
    return QuantizedTensor(
        scheme=scheme,
        codes=torch.cat([part.codes for part in parts]),
        scale=torch.cat([scale for scale in scales if isinstance(scale, Tensor)]),
        zero=torch.cat(zeros) if zeros else None,
    )


def _pages(cache: PagedCache, layer: int) -> Pages:
    scheme = cache.scheme.at(layer)
    if scheme.key.is_float:
        return Pages(keys=cache.keys[layer], values=cache.values[layer], dimension=cache.shape.head_dim)
    return Pages(
        keys=cache.key_codes[layer],
        values=cache.value_codes[layer],
        dimension=cache.shape.head_dim,
        key_scale=cache.key_scale[layer],
        value_scale=cache.value_scale[layer],
        bits=(scheme.key.bits, scheme.value.bits),
        rotated=(scheme.key.rotated, scheme.value.rotated),
    )
