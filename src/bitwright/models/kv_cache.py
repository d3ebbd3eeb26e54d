"""A quantized cache of keys and values for ``model.generate`` of any transformers model, and for our own loops."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.core.kv_scheme import KVScheme, parse_kv
from bitwright.models.hf import Cache, CacheLayerMixin, PretrainedConfig, PreTrainedModel
from bitwright.models.kv_packed import PackedTensor
from bitwright.models.kv_parameters import find_parameters
from bitwright.models.kv_storage import LayerParameters, LayerStore
from bitwright.models.kv_trial import safe_scheme

__all__ = ["QuantizedCache", "QuantizedCacheLayer"]

SLIDING = ("sliding_attention", "chunked_attention")
KNOWN = ("full_attention", "attention", *SLIDING)


class QuantizedCacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """One layer of :class:`QuantizedCache`: what transformers asks of a layer, over a :class:`LayerStore`."""

    is_compileable = False
    is_croppable = True

    def __init__(self, store: LayerStore, number: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.store, self.number = store, number
        self.is_sliding = store.sliding is not None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is reserved; transformers asks for this before some exports."""
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Code new keys and values (``[batch, heads, tokens, head_dim]``); return all, packed.

        Raises:
            BitwrightError: BW602 naming the layer, if a number is not finite; BW202 if heads of this size cannot be
                stored so.
        """
        self.is_initialized = True
        try:
            view = self.store.append(key_states, value_states)
        except BitwrightError as error:
            if error.code != "BW602":
                raise
            what = f"layer {self.number} makes keys or values that are NaN or infinite"
            raise BitwrightError(
                "BW602", what, suggestion="run the model without a quantized cache to see why"
            ) from None
        if self.store.scheme.is_float:
            return view.whole("key"), view.whole("value")
        return PackedTensor(view, "key"), PackedTensor(view, "value")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.stored + query_length, self.store.dropped

    def get_seq_length(self) -> int:
        return self.store.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.store.forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.store.change(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last ``-tokens_to_remove`` tokens; a positive number is how many stay, as it once was."""
        remove = -tokens_to_remove if tokens_to_remove <= 0 else self.store.length - tokens_to_remove
        if remove > 0:
            self.store.remove(remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.store.change(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.store.change(lambda part: part[indices])

    def offload(self) -> None:
        raise _no("offloading", "quantized keys and values are small; leave them where they are")

    def prefetch(self) -> None:
        raise _no("offloading", "quantized keys and values are small; leave them where they are")


class QuantizedCache(Cache):
    """Keys and values, quantized as they come, for ``past_key_values=`` of any causal language model of transformers.

    Eager and SDPA attention compute on the packed numbers, block by block; other attention functions get them as
    ordinary tensors. Layers with a sliding window drop what no query sees any more.

    Args:
        model: the model or its configuration.
        scheme: a name (``int8``, ``int4-rotated``, ...) or a :class:`~bitwright.core.kv_scheme.KVScheme`.
        parameters: of calibrated schemes, by layer; if not given, those in the model's directory.
        kv_safety: what is done where 4 bits or less are unsafe, which the model is tried for once: ``warn``, naming the
            layers; ``widen``: take 8-bit codes there; ``off``: not tried. A configuration alone cannot be.

    Raises:
        ArgumentError: BW202 for a scheme that is none, BW201 for overrides of layers that are not there and for layers
            without keys and values (linear attention and the like), and for models of an encoder and a decoder.
        BitwrightError: BW404 if the scheme is calibrated and the model is not.

    Example:
        >>> model = bitwright.load("demo:")
        >>> cache = bitwright.QuantizedCache(model, "int8")
        >>> output = model.generate(torch.tensor([[1, 2, 3]]), past_key_values=cache, max_new_tokens=5)
    """

    def __init__(
        self,
        model: PreTrainedModel | PretrainedConfig,
        scheme: str | int | KVScheme = "int8",
        *,
        parameters: Mapping[int, LayerParameters] | None = None,
        kv_safety: str = "warn",
    ) -> None:
        config = model.config if isinstance(model, PreTrainedModel) else model
        if getattr(config, "is_encoder_decoder", False):
            raise _no("models of an encoder and a decoder", "run it with its own cache, in float")
        text = config.get_text_config(decoder=True)
        self.scheme = scheme if isinstance(scheme, KVScheme) else parse_kv(scheme)
        windows = _windows(text)
        if isinstance(model, PreTrainedModel):
            self.scheme = safe_scheme(model, self.scheme, kv_safety)
        if parameters is None:
            parameters = find_parameters(config, self.scheme, len(windows)) if self.scheme.is_static else {}
        unknown = sorted(layer for layer in self.scheme.overrides if layer >= len(windows))
        if unknown:
            what = f"the cache scheme has overrides for layers {unknown}; the model has {len(windows)}"
            raise ArgumentError("BW201", what, suggestion=f"layers 0 to {len(windows) - 1}")
        layers = [
            QuantizedCacheLayer(_store(self.scheme.at(number), parameters.get(number, {}), window), number)
            for number, window in enumerate(windows)
        ]
        self.stores = [layer.store for layer in layers]
        super().__init__(layers=list(layers))

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values, with their scales, offsets and calibrated parameters."""
        return sum(store.nbytes for store in self.stores)

    def __repr__(self) -> str:
        length = self.get_seq_length()
        return f"QuantizedCache({self.scheme.name}, layers={len(self.layers)}, tokens={length}, bytes={self.nbytes})"


def _store(scheme: KVScheme, parameters: LayerParameters, window: int | None) -> LayerStore:
    if window is not None and (scheme.sinks or scheme.window):
        # The first tokens leave the window of such a layer, and its newest tokens are most of what there is.
        scheme = KVScheme(key=scheme.key, value=scheme.value)
    return LayerStore(scheme, parameters, sliding=window)


def _windows(config: PretrainedConfig) -> list[int | None]:
    """The window of each layer; ``None`` where attention reaches back to the beginning."""
    count = next(
        (value for name in ("num_hidden_layers", "n_layer", "num_layers") if (value := getattr(config, name, None))), 0
    )
    shared = getattr(config, "num_kv_shared_layers", 0) or 0
    kinds: Sequence[str] | None = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    if kinds is None:
        limited = window is not None and getattr(config, "use_sliding_window", True)
        kinds = ["sliding_attention" if limited else "full_attention"] * count
    strange = sorted({kind for kind in kinds if kind not in KNOWN})
    if strange:
        raise _no(f"a model with layers of {', '.join(strange)}", "run it with its own cache, in float")
    if "chunked_attention" in kinds:
        window = None  # chunks end at fixed places; all is kept, and the mask does the rest
    return [window if kind in SLIDING else None for kind in kinds[: len(kinds) - shared]]


def _no(what: str, suggestion: str) -> BitwrightError:
    return ArgumentError("BW201", f"the quantized cache does not support {what}", suggestion=suggestion)
