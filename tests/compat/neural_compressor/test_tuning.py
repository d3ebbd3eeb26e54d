"""Trying configurations, and the defaults of clients and servers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from bitwright.compat.neural_compressor.torch.quantization import (
    AutoRoundConfig,
    AWQConfig,
    GPTQConfig,
    HQQConfig,
    RTNConfig,
    TEQConfig,
    TuningConfig,
    WeightOnlyLinear,
    autotune,
    defaults,
    get_default_auto_round_config,
    get_default_awq_config,
    get_default_gptq_config,
    get_default_hqq_config,
    get_default_rtn_config,
    get_default_teq_config,
    tuning,
)
from bitwright.compat.neural_compressor.torch.quantization.config import WeightOnlyConfig
from bitwright.compat.neural_compressor.torch.quantization.defaults import Machine, classify, inspect_machine
from tests.quantization.tiny import Plain


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configuration of every call of ``quantize``."""
    made: list[Any] = []
    original = tuning.quantize

    def counted(model: nn.Module, config: Any, *arguments: Any, **keywords: Any) -> nn.Module:
        made.append(config)
        return original(model, config, *arguments, **keywords)

    monkeypatch.setattr(tuning, "quantize", counted)
    return made


def bits_of(model: nn.Module) -> int:
    layer = model.get_submodule("blocks.0.up")
    return layer.scheme.weight.bits if isinstance(layer, WeightOnlyLinear) else 0


@pytest.mark.parametrize(("scores", "loss", "count", "best"), [
    ([0.9, 1.1], 0.01, 2, 8),  # the second is good enough
    ([0.9, 0.8], 0.01, 3, 4),  # none is: the best is made again
    ([0.8, 0.9], 0.01, 2, 8),  # none is, and the best is at hand
    ([0.9, 1.1], 0.1, 1, 4),  # the first is good enough, to the last digit
    ([0.5, 0.5], 0.0, 3, 4),  # the earlier of equals
])  # fmt: skip
def test_trials_end_with_the_first_that_is_good_enough(
    calls: list[Any], scores: list[float], loss: float, count: int, best: int
) -> None:
    """W44."""
    model, seen = Plain(), iter([1.0, *scores])
    config = TuningConfig(config_set=[RTNConfig(bits=4), RTNConfig(bits=8)], tolerable_loss=loss)
    made = autotune(model, config, lambda each: next(seen))
    assert (len(calls), bits_of(made)) == (count, best)
    assert bits_of(model) == 0


def test_what_is_asked_is_handed_on(calls: list[Any]) -> None:
    x = torch.randn(32, 8)
    runs: list[Any] = []

    def run(model: nn.Module, data: Any) -> None:
        runs.append(data)
        model(data)

    def score(model: nn.Module, weight: float) -> float:
        return weight * (1.0 if bits_of(model) in (0, 8) else 0.5)

    config = TuningConfig(config_set=[{"gptq": {"bits": 3}}, {"gptq": {"bits": 8}}])
    made = autotune(Plain(), config, score, eval_args=(2.0,), run_fn=run, run_args=(x,))
    assert bits_of(made) == 8 and len(runs) == len(calls) == 2 and runs[0] is x


def test_no_more_than_so_many_trials(calls: list[Any]) -> None:
    config = TuningConfig(config_set=[RTNConfig(bits=2), RTNConfig(bits=8)], max_trials=1)
    assert bits_of(autotune(Plain(), config, lambda model: float(bits_of(model) in (0, 8)))) == 2
    assert len(calls) == 1


@pytest.mark.parametrize(("fields", "named"), [
    ({}, "config_set"), ({"config_set": [RTNConfig()], "tolerable_loss": -1}, "tolerable_loss is -1"),
    ({"config_set": [RTNConfig()], "max_trials": 0}, "max_trials is 0"),
])  # fmt: skip
def test_tuning_configurations_are_checked(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        TuningConfig(**fields)


def test_one_configuration_is_a_set() -> None:
    assert list(TuningConfig(config_set=RTNConfig()).config_set) == [RTNConfig()]  # type: ignore[arg-type]


GETTERS: dict[str, tuple[Callable[..., WeightOnlyConfig], WeightOnlyConfig, WeightOnlyConfig]] = {
    "rtn": (get_default_rtn_config, RTNConfig(), RTNConfig(use_layer_wise=True)),
    "gptq": (get_default_gptq_config, GPTQConfig(), GPTQConfig(use_layer_wise=True)),
    "autoround": (get_default_auto_round_config, AutoRoundConfig(), AutoRoundConfig(use_layer_wise=True)),
    "awq": (get_default_awq_config, AWQConfig(), AWQConfig()),
    "teq": (get_default_teq_config, TEQConfig(), TEQConfig()),
    "hqq": (get_default_hqq_config, HQQConfig(), HQQConfig()),
}


@pytest.mark.parametrize("name", GETTERS)
def test_defaults_of_clients_and_servers(name: str) -> None:
    """W45."""
    getter, server, client = GETTERS[name]
    for spelling in ("client", "Client", "CLIENT"):
        assert getter(spelling) == getter(processor_type=spelling) == client
    for spelling in ("server", "SERVER"):
        assert getter(spelling) == server
    with pytest.raises(ValueError, match=r"'foo'(.|\n)*'client', 'server'"):
        getter("foo")
    assert getter(rule=lambda machine: "client") == client
    assert getter(rule=lambda machine: "Server") == server
    with pytest.raises(ValueError, match="'desktop'"):
        getter(rule=lambda machine: "desktop")
    assert getter() in (server, client)


@pytest.mark.parametrize(("processor", "sockets", "memory", "kind"), [
    ("Intel(R) Core(TM) Ultra 7 155H", 1, 16, "client"), ("Intel(R) Core(TM) Ultra 7 155H", 1, 64, "server"),
    ("Intel(R) Xeon(R) Platinum 8480+", 1, 16, "server"), ("AMD EPYC 9654", 1, 16, "server"),
    ("AMD Ryzen 9 7950X", 2, 16, "server"), ("", 1, 8, "client"),
])  # fmt: skip
def test_the_rule(processor: str, sockets: int, memory: int, kind: str) -> None:
    assert classify(Machine(processor=processor, sockets=sockets, memory=memory << 30)) == kind


def test_machines_are_read_from_what_the_system_tells(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "processor: 0\nmodel name\t: Some CPU\nphysical id\t: 0\n\nmodel name\t: Some CPU\nphysical id\t: 1\n"
    monkeypatch.setattr(defaults, "read_system_file", lambda path: text)
    monkeypatch.setattr(defaults, "machine_memory", lambda: (8 << 30, 1))
    assert inspect_machine() == Machine(processor="Some CPU", sockets=2, memory=8 << 30)
    monkeypatch.setattr(defaults, "read_system_file", lambda path: "")
    assert inspect_machine() == Machine(processor="", sockets=1, memory=8 << 30)
