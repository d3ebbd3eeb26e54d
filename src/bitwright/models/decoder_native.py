"""The fast decoder: a loaded model's weights, and one native call for all layers of a step.

Between products everything is float32. If the model is of a 16-bit dtype, activations of 16 bits are 16-bit integers
where weights are codes, with a scale for each token (closer than bfloat16, and as fast as integers), and bfloat16 where
weights are bfloat16. In a float32 model they stay float32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from bitwright.core.errors import ArgumentError
from bitwright.core.kv_codes import has_patterns
from bitwright.core.kv_scheme import KVCode, KVScheme
from bitwright.core.scheme import LayerScheme
from bitwright.kernels import native, native_library
from bitwright.kernels.native_decoder import NativeStack, StackShape
from bitwright.kernels.native_pages import MOST_DIMENSION, Batch, Pages
from bitwright.models.decoder import Step, read_shape, refuse_architecture
from bitwright.models.decoder_weights import LAYERS, MOST_COLUMNS, DecoderWeights, ModelSource, pack_decoder
from bitwright.models.paged_cache import CacheShape, PagedCache
from bitwright.models.quantized import QuantizedLinear

if TYPE_CHECKING:
    from bitwright.models.hf import PreTrainedModel

__all__ = ["NativeDecoder", "refuse", "refuse_cache"]

FIRST_POSITIONS = 1024  # whose angles are computed at once; more when a text is longer


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
    whole: Any = model
    for number, block in enumerate(whole.model.layers):
        for path in LAYERS.values():
            reason = _refuse_layer(block.get_submodule(path))
            if reason is not None:
                return f"layer {number}, {path}: {reason}"
    return _refuse_layer(whole.get_output_embeddings())


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
        if any(has_patterns(code, head_dim) for code in codes):
            return f"a rotated head of {head_dim} numbers is not supported"
        if head_dim * min(code.bits for code in codes) % 8:
            return f"a head of {head_dim} numbers is an odd number of 4-bit codes"
    return None


def _is_own(code: KVCode) -> bool:
    """Whether these are asymmetric integers whose scale belongs to one token and head."""
    return code.kind == "int" and code.grain == "token_head" and not code.symmetric and not code.group


class NativeDecoder:
    """Runs steps of ``model`` natively; a row's logits are the same in any company, bit for bit.

    Args:
        model: a loaded one, or weights that are packed already.
        head: how the output head is stored: as it is, or rounded to nearest in this scheme, for instance
            ``parse("w8")``. Where the embedding shares its weight, it is read from there, too.
        release: whether the loaded model lets go of float weights as soon as they are packed, and cannot be run itself
            any more. Quantized layers are shared with it.

    Raises:
        ArgumentError: BW201 if :func:`refuse` says why it cannot run the model, or the head cannot be stored so.
    """

    def __init__(
        self, model: PreTrainedModel | DecoderWeights, *, head: LayerScheme | None = None, release: bool = False
    ) -> None:
        if not isinstance(model, DecoderWeights):
            reason = refuse(model)
            if reason is not None:
                what = f"the model cannot be decoded natively: {reason}"
                raise ArgumentError("BW201", what, suggestion="bitwright.generate runs every model")
            model = pack_decoder(read_shape(model), ModelSource(model, release=release), head)
        weights = model
        self.shape = shape = weights.shape
        self._dtype, self._weight_bytes = weights.dtype, weights.bytes()
        self._stack = NativeStack(
            StackShape(
                hidden=shape.hidden, intermediate=shape.intermediate, heads=shape.heads, kv_heads=shape.kv_heads,
                dimension=shape.head_dim, vocabulary=shape.vocabulary, epsilon=shape.norm_epsilon,
                are_halves=self._dtype != torch.float32,
            ),
            weights.blocks, weights.embedding, weights.final_norm, weights.head,
        )  # fmt: skip
        self._angles = self._turns(min(FIRST_POSITIONS, shape.positions))
        self._pages: WeakKeyDictionary[PagedCache, list[Pages]] = WeakKeyDictionary()

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
        return self._weight_bytes

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
