"""DashInfer's engine: models by name, requests by handle, and a status for every call.

A call that cannot be done returns the status that says so, and a notice (a warning) names what was wrong; it never
raises for what a user gave, and never hangs.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch

from bitwright.compat.dashinfer.allspark.generation_config import GenerationConfigBuilder, read_generation
from bitwright.compat.dashinfer.allspark.model_loader import HuggingFaceModel
from bitwright.compat.dashinfer.allspark.names import (
    AsCacheMode,
    AsStatus,
    GenerateRequestStatus,
    Refusal,
    TargetDevice,
)
from bitwright.compat.dashinfer.allspark.queue import ResultQueue
from bitwright.compat.dashinfer.allspark.runtime_config import RuntimeConfig
from bitwright.core.errors import BitwrightError, Notice
from bitwright.engine.engine import Engine as OwnEngine
from bitwright.engine.handle import RequestHandle
from bitwright.models.hf import PreTrainedModel, context_length
from bitwright.models.loading import load

__all__ = ["AsCacheMode", "AsStatus", "Engine", "GenerateRequestStatus", "TargetDevice"]

Started: TypeAlias = tuple[AsStatus, RequestHandle | None, ResultQueue | None]
GenerationConfig: TypeAlias = GenerationConfigBuilder | Mapping[str, Any]

# The hundreds digit of an error's code, and the codes that are not as the rest of theirs.
STATUS_OF_KIND = {
    2: AsStatus.ALLSPARK_PARAM_ERROR,
    3: AsStatus.ALLSPARK_IO_ERROR,
    4: AsStatus.ALLSPARK_EXCEED_LIMIT_ERROR,
    5: AsStatus.ALLSPARK_MEMORY_ERROR,
    6: AsStatus.ALLSPARK_RUNTIME_ERROR,
}
STATUS_OF_CODE = {"BW209": AsStatus.ALLSPARK_INVALID_CALL_ERROR, "BW505": AsStatus.ALLSPARK_RUNTIME_ERROR}


@dataclass(slots=True)
class _Installed:
    """A model that the engine knows: how it is to be run, and while it is, by what."""

    config: RuntimeConfig
    model: PreTrainedModel | Path
    engine: OwnEngine | None = None
    requests: dict[int, RequestHandle] = field(default_factory=dict)


class Engine:
    """Any number of models, each with requests of its own.

    Example:
        >>> status, handle, queue = engine.start_request_ids("demo", loader, [1, 2, 3], {"max_length": 20})
    """

    def __init__(self) -> None:
        self._models: dict[str, _Installed] = {}
        self._lock = threading.RLock()

    def install_model(self, config: RuntimeConfig) -> AsStatus:
        """Take over what the configuration's loader has serialized."""
        return self._answer(lambda: self._install(config))

    def _install(self, config: RuntimeConfig) -> None:
        if not isinstance(config, RuntimeConfig):
            raise _wrong(f"the runtime config is a {type(config).__name__}; call build() of its builder")
        if config.model_name in self._models:
            raise _invalid(f"a model {config.model_name!r} is installed already; release it first")
        model = config.loader.serialized
        if model is None:
            raise _invalid("nothing is serialized; serialize(...) before install_model, and free it after")
        self._models[config.model_name] = _Installed(config, model)

    def start_model(self, model_name: str) -> AsStatus:
        """Make room for the cache, and take requests."""
        return self._answer(lambda: self._start(model_name))

    def _start(self, model_name: str) -> None:
        installed = self._installed(model_name)
        if installed.engine is not None:
            raise _invalid(f"the model {model_name!r} is started already")
        config, loader = installed.config, installed.config.loader
        if isinstance(installed.model, Path):
            installed.model = load(installed.model, dtype=loader.data_type)
        if config.device is TargetDevice.CUDA:
            if torch.cuda.is_available():
                module: Any = installed.model
                module.to(f"cuda:{_cuda_device(config)}")
            else:
                warnings.warn("there is no CUDA device: the model runs on the CPU", Notice, stacklevel=4)
        context = context_length(installed.model.config) or config.max_length
        if config.max_length > context:
            what = f"max_length is {config.max_length}, but the model has a context of {context}, which counts"
            warnings.warn(what, Notice, stacklevel=4)
        installed.engine = OwnEngine(
            installed.model,
            tokenizer=loader.get_tokenizer(),
            max_batch=config.max_batch,
            max_length=min(config.max_length, context),
            kv_cache=config.cache_mode.value,
            reuse=config.span,
            reuse_seconds=config.prefix_ttl,
        )

    def start_request_text(
        self, model_name: str, model_loader: HuggingFaceModel, text: str, generation_config: GenerationConfig
    ) -> Started:
        """Ask for what continues ``text``, in which control tokens may be spelled, as a chat template does."""
        return self._begin(lambda: self._ask(model_name, _tokens(model_loader, text), generation_config))

    def start_request_ids(
        self, model_name: str, model_loader: HuggingFaceModel, ids: Sequence[int], generation_config: GenerationConfig
    ) -> Started:
        """Ask for what continues the tokens ``ids``; of the handle and the queue, both are ``None`` if it fails."""
        return self._begin(lambda: self._ask(model_name, _list(ids), generation_config))

    def _begin(self, ask: Callable[[], tuple[RequestHandle, ResultQueue]]) -> Started:
        started: list[tuple[RequestHandle, ResultQueue]] = []
        status = self._answer(lambda: started.append(ask()))
        return (status, *started[0]) if started else (status, None, None)

    def _ask(self, model_name: str, ids: list[int], config: GenerationConfig) -> tuple[RequestHandle, ResultQueue]:
        installed = self._installed(model_name)
        engine = installed.engine
        if engine is None:
            raise _invalid(f"the model {model_name!r} is not started")
        options = read_generation(config, len(ids), engine.max_length, installed.config.loader.get_tokenizer())
        handle = engine.submit(ids, options)
        installed.requests[handle.number] = handle
        return handle, ResultQueue(handle, len(ids))

    def sync_request(self, model_name: str, request_handle: RequestHandle | None = None) -> AsStatus:
        """Wait for the end of a request; without a handle, of all requests to the model."""
        waited: list[RequestHandle] = []
        status = self._answer(lambda: waited.extend(self._requests(model_name, request_handle)))
        for handle in waited:  # outside of the lock: others go on meanwhile
            try:
                handle.result()
            except BitwrightError as error:
                status = _tell(_status_of(error), error.render())
        return status

    def stop_request(self, model_name: str, request_handle: RequestHandle) -> AsStatus:
        """Have a request end where it is; its queue can still be read."""
        return self._answer(lambda: self._one(model_name, request_handle).cancel())

    def release_request(self, model_name: str, request_handle: RequestHandle) -> AsStatus:
        """Forget a request, which ends it; once."""
        return self._answer(lambda: self._release(model_name, request_handle))

    def _release(self, model_name: str, request_handle: RequestHandle) -> None:
        self._one(model_name, request_handle).cancel()
        del self._installed(model_name).requests[request_handle.number]

    def stop_model(self, model_name: str) -> AsStatus:
        """End all requests to a model, and free its cache; it can be started again."""
        return self._answer(lambda: self._stop(model_name))

    def _stop(self, model_name: str) -> None:
        installed = self._installed(model_name)
        if installed.engine is None:
            raise _invalid(f"the model {model_name!r} is not started")
        installed.engine.close()
        installed.engine = None

    def release_model(self, model_name: str) -> AsStatus:
        """Forget a model; stop it first, if it is running."""
        return self._answer(lambda: self._forget(model_name))

    def _forget(self, model_name: str) -> None:
        if self._installed(model_name).engine is not None:
            self._stop(model_name)
        del self._models[model_name]

    def _installed(self, model_name: str) -> _Installed:
        installed = self._models.get(model_name) if isinstance(model_name, str) else None
        if installed is None:
            known = ", ".join(self._models) or "none"
            raise _wrong(f"there is no model {model_name!r}; installed: {known}")
        return installed

    def _requests(self, model_name: str, handle: RequestHandle | None) -> list[RequestHandle]:
        if handle is None:
            return list(self._installed(model_name).requests.values())
        return [self._one(model_name, handle)]

    def _one(self, model_name: str, handle: object) -> RequestHandle:
        requests = self._installed(model_name).requests
        known = requests.get(handle.number) if isinstance(handle, RequestHandle) else None
        if known is None or known is not handle:
            raise _wrong(f"the model {model_name!r} has no such request; it may have been released")
        return known

    def _answer(self, call: Callable[[], None]) -> AsStatus:
        """Do it, and say how it went."""
        try:
            with self._lock:
                call()
        except Refusal as refusal:
            return _tell(refusal.status, str(refusal))
        except BitwrightError as error:
            return _tell(_status_of(error), error.render())
        return AsStatus.ALLSPARK_SUCCESS


def _cuda_device(config: RuntimeConfig) -> int:
    number, count = config.device_ids[0] if config.device_ids else 0, torch.cuda.device_count()
    if number >= count:
        raise _wrong(f"there is no CUDA device {number}; there are {count}, from 0 on")
    return number


def _tokens(loader: object, text: object) -> list[int]:
    if not isinstance(loader, HuggingFaceModel):
        raise _wrong(f"model_loader is a {type(loader).__name__}, not a HuggingFaceModel")
    if not isinstance(text, str) or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise _wrong("the prompt is not a text, or has a lone surrogate")
    return [int(token) for token in loader.get_tokenizer().encode(text)] if text else []


def _list(ids: object) -> list[int]:
    if not isinstance(ids, Sequence) or isinstance(ids, str | bytes):
        raise _wrong(f"the prompt is a {type(ids).__name__}; accepted: a list of tokens")
    return list(ids)


def _wrong(what: str) -> Refusal:
    return Refusal(AsStatus.ALLSPARK_PARAM_ERROR, what)


def _invalid(what: str) -> Refusal:
    return Refusal(AsStatus.ALLSPARK_INVALID_CALL_ERROR, what)


def _status_of(error: BitwrightError) -> AsStatus:
    return STATUS_OF_CODE.get(error.code) or STATUS_OF_KIND[error.exit_status]


def _tell(status: AsStatus, what: str) -> AsStatus:
    warnings.warn(f"{status.name}: {what}", Notice, stacklevel=4)
    return status
