"""How a model is to be run, put together step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self

from bitwright.compat.dashinfer.allspark.names import AsCacheMode, TargetDevice
from bitwright.core.errors import ArgumentError
from bitwright.engine.options import check_count
from bitwright.models.paged_cache import PAGE

if TYPE_CHECKING:
    from bitwright.compat.dashinfer.allspark.model_loader import HuggingFaceModel

__all__ = ["RuntimeConfig", "RuntimeConfigBuilder"]

SPANS = (32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeConfig:
    """What :meth:`bitwright.compat.dashinfer.allspark.Engine.install_model` takes.

    Attributes:
        model_name: by which the engine knows the model.
        loader: that serialized it.
        device: where it runs; ``device_ids`` are taken and not used, since a model runs on one device.
        max_length: of a prompt and its answer.
        max_batch: requests at once.
        cache_mode: how keys and values are stored.
        span: how many tokens of equal beginnings are reused at a time; 0 for no reuse.
        prefix_ttl: for how many seconds an unused beginning is kept; ``None`` as long as there is room.
    """

    model_name: str
    loader: HuggingFaceModel
    device: TargetDevice
    device_ids: tuple[int, ...]
    max_length: int
    max_batch: int
    cache_mode: AsCacheMode = AsCacheMode.AsCacheDefault
    span: int = 128
    prefix_ttl: float | None = 300.0


class RuntimeConfigBuilder:
    """Changes one field after the other; every call returns the builder.

    Raises:
        ArgumentError: BW201 from each call, naming the field.
    """

    def __init__(self, config: RuntimeConfig) -> None:
        self._config = config

    def _with(self, **change: object) -> Self:
        self._config = replace(self._config, **change)  # type: ignore[arg-type]
        return self

    def model_name(self, name: str) -> Self:
        return self._with(model_name=_text("model_name", name))

    def max_length(self, length: int) -> Self:
        return self._with(max_length=check_count("max_length", length, 3))

    def max_batch(self, count: int) -> Self:
        return self._with(max_batch=check_count("max_batch", count, 1))

    def compute_unit(self, device: TargetDevice, device_ids: Sequence[int] = (0,), threads: int = 0) -> Self:
        """Where to run; ``threads`` is taken and not used: torch's own setting counts."""
        if not isinstance(device, TargetDevice):
            raise ArgumentError("BW201", f"device is {device!r}", suggestion="a TargetDevice")
        return self._with(device=device, device_ids=tuple(check_count("a device id", each, 0) for each in device_ids))

    def kv_cache_mode(self, mode: AsCacheMode) -> Self:
        if not isinstance(mode, AsCacheMode):
            raise ArgumentError("BW201", f"kv_cache_mode is {mode!r}", suggestion="an AsCacheMode")
        return self._with(cache_mode=mode)

    def kv_cache_span_size(self, tokens: int) -> Self:
        if tokens not in SPANS:
            what = f"kv_cache_span_size is {tokens!r}"
            raise ArgumentError("BW201", what, suggestion=f"one of {', '.join(map(str, SPANS))}")
        return self._with(span=tokens)

    def enable_prefix_cache(self, enable: bool) -> Self:
        if type(enable) is not bool:
            raise ArgumentError("BW201", f"enable_prefix_cache is {enable!r}", suggestion="True or False")
        return self._with(span=(self._config.span or 128) // PAGE * PAGE if enable else 0)

    def prefill_cache_ttl(self, seconds: float) -> Self:
        is_number = isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds < 1e9
        if not is_number:
            raise ArgumentError("BW201", f"prefill_cache_ttl is {seconds!r}", suggestion="seconds, 0 or more")
        return self._with(prefix_ttl=float(seconds))

    def build(self) -> RuntimeConfig:
        """The configuration as it is now."""
        return self._config


def _text(name: str, value: object) -> str:
    if not isinstance(value, str) or not value:
        raise ArgumentError("BW201", f"{name} is {value!r}", suggestion="a name that is not empty")
    return value
