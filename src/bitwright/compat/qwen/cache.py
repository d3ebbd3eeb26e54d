"""The quantized cache of Qwen's document: its functions, its layout, and its switches on a loaded model."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from bitwright.core.errors import ArgumentError, Notice
from bitwright.core.kv_codes import Coded, encode_kv, join
from bitwright.core.kv_scheme import KVCode
from bitwright.models.hf import PreTrainedModel
from bitwright.models.kv_cache import QuantizedCache
from bitwright.models.kv_storage import SIDES, LayerStore

__all__ = ["QwenCache", "dequantize_cache_torch", "layer_past", "quantize_cache_v", "use_quantized_cache"]

INT8 = KVCode(bits=8)
QuantizedStates = tuple[Tensor, Tensor, Tensor]
LayerPast = tuple[QuantizedStates, QuantizedStates] | tuple[Tensor, Tensor]
REPLACED: WeakSet[Any] = WeakSet()  # caches of others, empty when they were given to a model
SWITCHES = ("use_cache_quantization", "use_cache_kernel", "use_flash_attn")


def quantize_cache_v(v: Tensor) -> QuantizedStates:
    """Codes of keys or values, ``[..., tokens, head_dim]`` (any float dtype), of each token and head by itself.

    Returns:
        ``qv`` (uint8, as ``v``), ``scale`` and ``zero_point`` (float32 ``[..., tokens, 1]``), with
        ``v = scale * (qv - zero_point)``. Codes are rounded, not cut off; a constant comes back exactly.

    Raises:
        BitwrightError: BW201 for a tensor that is not of floats, BW602 for NaN.

    Example:
        >>> qv, scale, zero_point = quantize_cache_v(torch.tensor([[0.0, 1.0, 2.55]]))
        >>> qv.tolist()
        [[0, 100, 255]]
    """
    if not isinstance(v, Tensor) or not v.is_floating_point() or v.dim() < 1:
        found = str(v.dtype) if isinstance(v, Tensor) else type(v).__name__
        raise ArgumentError("BW201", f"v is a {found}", suggestion="a tensor of floats, [..., tokens, head_dim]")
    coded = encode_kv(v.reshape(1, 1, -1, v.shape[-1]), INT8, search=False)
    return tuple(part.reshape(*v.shape[:-1], -1) for part in _states(coded))  # type: ignore[return-value]


def dequantize_cache_torch(qv: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """``scale * (qv - zero_point)``, float32: the inverse of :func:`quantize_cache_v`."""
    return scale * (qv.to(torch.float32) - zero_point)


class QwenCache(QuantizedCache):
    """A quantized cache whose layers can be looked at in the document's layout.

    ``cache[i]`` is the ``layer_past`` of layer i: ``((q_key, key_scale, key_zero_point), (q_value, value_scale,
    value_zero_point))``. Attention reads the packed codes, not these.
    """

    def __getitem__(self, layer: int) -> LayerPast:
        return _layer_past(self.stores[layer])

    def __iter__(self) -> Iterator[LayerPast]:
        return (_layer_past(store) for store in self.stores)


def layer_past(past_key_values: Any) -> tuple[LayerPast, ...]:
    """The ``layer_past`` of each layer of what a model returns as ``past_key_values``.

    With a quantized cache in the layout of :class:`QwenCache`, else ``(key, value)``.

    Raises:
        ArgumentError: BW201 for a cache that is empty, or of another scheme than ``int8`` and ``none``.
    """
    if isinstance(past_key_values, QuantizedCache):
        return tuple(_layer_past(store) for store in past_key_values.stores)
    return tuple((layer.keys, layer.values) for layer in past_key_values.layers)


def use_quantized_cache(model: PreTrainedModel, switches: Mapping[str, bool | None]) -> None:
    """Give ``model`` a quantized cache whenever it would make one of its own, if the switches say so.

    Those that are ``None`` are as in the model's configuration, or off. What has no effect here is told.

    Raises:
        ArgumentError: BW201 for a switch that is neither true nor false.
    """
    given = {name: switches.get(name) for name in SWITCHES}
    for name, value in given.items():
        if value is not None and type(value) is not bool:
            raise ArgumentError("BW201", f"{name} is {value!r}", suggestion="True or False")
    settled = {name: getattr(model.config, name, False) if value is None else value for name, value in given.items()}
    if settled["use_cache_kernel"]:
        _tell("use_cache_kernel has no effect: no kernel files are needed, attention reads the codes by itself")
    if not settled["use_cache_quantization"]:
        return
    if settled["use_flash_attn"] is True:
        _tell("use_flash_attn is set aside: with a quantized cache, attention runs block by block on its codes instead")
    model.register_forward_pre_hook(_replace_cache, with_kwargs=True)


def _tell(message: str) -> None:
    warnings.warn(message, Notice, stacklevel=4)


def _replace_cache(model: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """Put a quantized cache in the place of none, or of an empty one, where the model is to use a cache at all.

    ``generate`` makes an empty one of its own and goes on with what the model returns. A caller who gives a
    ``DynamicCache`` again that was replaced, and so is empty still, would lose the context.

    Raises:
        ArgumentError: BW201 for such a cache.
    """
    assert isinstance(model, PreTrainedModel)
    wanted = keywords.get("use_cache")
    wanted = getattr(model.config, "use_cache", True) if wanted is None else wanted
    cache = keywords.get("past_key_values")
    is_fresh = cache is None or (not isinstance(cache, QuantizedCache) and cache.get_seq_length() == 0)
    if not wanted or not is_fresh:
        return arguments, keywords
    if type(cache).__name__ == "DynamicCache":  # a static one is reset and used again by generate itself
        if cache in REPLACED:
            what = "past_key_values is empty still: an earlier call stored keys and values in a quantized cache instead"
            advice = "pass output.past_key_values of that call on, or a new cache for a new text"
            raise ArgumentError("BW201", what, suggestion=advice)
        REPLACED.add(cache)
    return arguments, {**keywords, "past_key_values": QwenCache(model, "int8"), "use_cache": True}


def _layer_past(store: LayerStore) -> LayerPast:
    parts: list[Any] = []
    for side in SIDES:
        if store.codes[side] != INT8 and not store.scheme.is_float:
            what = f"a cache of {store.codes[side].name} has no layer_past in this layout"
            raise ArgumentError("BW201", what, suggestion="a cache of int8, or of none")
        if not store.stored:
            raise ArgumentError("BW201", "an empty cache has no layer_past", suggestion="the cache of a model that ran")
        coded = join(list(store.runs[side].blocks))
        parts.append(coded.codes if store.scheme.is_float else _states(coded))
    return parts[0], parts[1]


def _states(coded: Coded) -> QuantizedStates:
    """``code * scale + low`` as ``scale * (code - zero_point)``; a constant has code 0, scale 1 and its own zero."""
    assert coded.scale is not None
    assert coded.low is not None
    scale = torch.where(coded.scale == 0, 1.0, coded.scale)
    return coded.codes, scale, -coded.low / scale
