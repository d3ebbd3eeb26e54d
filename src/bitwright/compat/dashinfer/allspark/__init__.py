"""DashInfer's ``allspark``: models that are serialized, an engine that they are installed in, queues of tokens.

Example:
    >>> from bitwright.compat.dashinfer import allspark
    >>> loader = allspark.HuggingFaceModel("demo:", "demo", in_memory_serialize=True)
    >>> engine = allspark.Engine()
    >>> loader.load_model().serialize(engine).free_model()
    >>> config = loader.create_reference_runtime_config_builder("demo", allspark.TargetDevice.CPU, [0]).build()
    >>> engine.install_model(config), engine.start_model("demo")
    >>> options = loader.create_reference_generation_config_builder(config)
    >>> status, handle, queue = engine.start_request_text("demo", loader, "Once upon a time", options)
    >>> engine.sync_request("demo", handle)
    >>> queue.Get().ids_from_generate
"""

from __future__ import annotations

from bitwright.compat.dashinfer.allspark.engine import Engine
from bitwright.compat.dashinfer.allspark.generation_config import GenerationConfigBuilder
from bitwright.compat.dashinfer.allspark.model_loader import HuggingFaceModel
from bitwright.compat.dashinfer.allspark.names import AsCacheMode, AsStatus, GenerateRequestStatus, TargetDevice
from bitwright.compat.dashinfer.allspark.queue import GeneratedElements, ResultQueue
from bitwright.compat.dashinfer.allspark.runtime_config import RuntimeConfig, RuntimeConfigBuilder

__all__ = [
    "AsCacheMode",
    "AsStatus",
    "Engine",
    "GenerateRequestStatus",
    "GeneratedElements",
    "GenerationConfigBuilder",
    "HuggingFaceModel",
    "ResultQueue",
    "RuntimeConfig",
    "RuntimeConfigBuilder",
    "TargetDevice",
]
