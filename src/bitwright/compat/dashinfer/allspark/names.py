"""The constants of DashInfer's interface, and what an engine answers where a call cannot be done."""

from __future__ import annotations

import enum

__all__ = ["AsCacheMode", "AsStatus", "GenerateRequestStatus", "Refusal", "TargetDevice"]


class AsStatus(enum.IntEnum):
    """What a call of the engine returns."""

    ALLSPARK_SUCCESS = 0
    ALLSPARK_UNKNOWN_ERROR = 1
    ALLSPARK_PARAM_ERROR = 2
    ALLSPARK_IO_ERROR = 3
    ALLSPARK_MEMORY_ERROR = 4
    ALLSPARK_RUNTIME_ERROR = 5
    ALLSPARK_EXCEED_LIMIT_ERROR = 7
    ALLSPARK_INVALID_CALL_ERROR = 8


class GenerateRequestStatus(enum.Enum):
    """Where a request is, as its queue tells."""

    Init = 0
    ContextFinished = 1
    Generating = 2
    GenerateFinished = 3
    GenerateInterrupted = 4


class TargetDevice(enum.Enum):
    """Where a model runs."""

    CPU = "CPU"
    CPU_NUMA = "CPU_NUMA"
    CUDA = "CUDA"


class AsCacheMode(enum.Enum):
    """How keys and values are stored; the value is bitwright's name of it."""

    AsCacheDefault = "none"
    AsCacheQuantI8 = "int8"
    AsCacheQuantU4 = "int4"


class Refusal(Exception):
    """Why a call cannot be done: the engine returns ``status`` and tells ``what`` as a notice."""

    def __init__(self, status: AsStatus, what: str) -> None:
        super().__init__(what)
        self.status = status
