"""Default configurations, which depend on whether the machine is a server or somebody's own."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bitwright.compat.neural_compressor.torch.quantization.autoround_config import AutoRoundConfig
from bitwright.compat.neural_compressor.torch.quantization.configs import (
    AWQConfig,
    GPTQConfig,
    HQQConfig,
    RTNConfig,
    TEQConfig,
)
from bitwright.core.errors import ArgumentError
from bitwright.core.memory import machine_memory, read_system_file

__all__ = [
    "Machine",
    "Rule",
    "classify",
    "get_default_auto_round_config",
    "get_default_awq_config",
    "get_default_gptq_config",
    "get_default_hqq_config",
    "get_default_rtn_config",
    "get_default_teq_config",
    "inspect_machine",
]

CLIENT, SERVER = "client", "server"
SERVER_BRANDS = re.compile(r"xeon|epyc|neoverse|graviton|ampere|power\d", re.IGNORECASE)
CLIENT_MEMORY = 32 << 30  # bytes; more is a server


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What the decision is made from: the processor's name, how many of them, and the memory in bytes."""

    processor: str
    sockets: int
    memory: int


Rule = Callable[[Machine], str]


def inspect_machine() -> Machine:
    """This machine, as far as Linux tells; one nameless processor elsewhere."""
    text = read_system_file(Path("/proc/cpuinfo"))
    names = re.findall(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    sockets = set(re.findall(r"^physical id\s*:\s*(\d+)$", text, re.MULTILINE))
    return Machine(processor=names[0] if names else "", sockets=max(1, len(sockets)), memory=machine_memory()[0])


def classify(machine: Machine) -> str:
    """``server`` for several processors, a processor made for servers, or more than 32 GiB; else ``client``."""
    is_server = machine.sockets > 1 or SERVER_BRANDS.search(machine.processor) or machine.memory > CLIENT_MEMORY
    return SERVER if is_server else CLIENT


def get_default_rtn_config(processor_type: str | None = None, *, rule: Rule = classify) -> RTNConfig:
    """The defaults; on a client, one block of float weights in memory at a time.

    ``processor_type`` is ``client`` or ``server`` in any case; without it, ``rule`` decides.

    Raises:
        ArgumentError: BW201 (a ``ValueError``) for any other type.
    """
    return RTNConfig(use_layer_wise=_is_client(processor_type, rule))


def get_default_gptq_config(processor_type: str | None = None, *, rule: Rule = classify) -> GPTQConfig:
    """As :func:`get_default_rtn_config`."""
    return GPTQConfig(use_layer_wise=_is_client(processor_type, rule))


def get_default_auto_round_config(processor_type: str | None = None, *, rule: Rule = classify) -> AutoRoundConfig:
    """As :func:`get_default_rtn_config`."""
    return AutoRoundConfig(use_layer_wise=_is_client(processor_type, rule))


def get_default_awq_config(processor_type: str | None = None, *, rule: Rule = classify) -> AWQConfig:
    """The defaults, which are the same on every machine; ``processor_type`` is checked all the same."""
    _is_client(processor_type, rule)
    return AWQConfig()


def get_default_teq_config(processor_type: str | None = None, *, rule: Rule = classify) -> TEQConfig:
    """As :func:`get_default_awq_config`."""
    _is_client(processor_type, rule)
    return TEQConfig()


def get_default_hqq_config(processor_type: str | None = None, *, rule: Rule = classify) -> HQQConfig:
    """As :func:`get_default_awq_config`."""
    _is_client(processor_type, rule)
    return HQQConfig()


def _is_client(processor_type: str | None, rule: Rule) -> bool:
    found = rule(inspect_machine()) if processor_type is None else processor_type
    if not isinstance(found, str) or found.lower() not in (CLIENT, SERVER):
        raise ArgumentError("BW201", f"processor_type is {found!r}", suggestion="accepted: 'client', 'server', None")
    return found.lower() == CLIENT
