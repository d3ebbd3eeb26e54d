"""GPTQ of one block of the shape of Llama-3-8B on the GPU, against what its arithmetic takes there."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import torch
from torch import nn

from benchmarks import block as on_cpu
from benchmarks.gpu_runs.timing import Bench, Section
from bitwright.core.scheme import LayerScheme
from bitwright.core.scheme_names import parse
from bitwright.models.blocks import linears
from bitwright.quantization.algorithms import make_method
from bitwright.quantization.capture import BlockCall
from bitwright.quantization.stream import BlockWork, Flow, quantize_block

__all__ = ["measure_rounding"]

TOKENS, LENGTH, BLOCKS = 65536, 2048, 32


def measure_rounding(bench: Bench) -> Section:
    """Seconds of one block, twice (the first compiles and warms up), and what that makes for the model."""
    section = bench.begin("quantizing one block of llama-3-8b, w4g128, 65,536 tokens",
                          ("algorithm", "run", "seconds", "floor", "times floor", "whole model, 32 blocks",
                           "output error"))  # fmt: skip
    floor = sum(value for name, value in _floor(bench).items() if name != "total")
    runs = [("gptq", {}), ("gptq", {}), ("rtn", {}), ("hqq", {}), ("awq", {}), ("autoround", {"iters": 20})]
    for number, (algorithm, options) in bench.within(section, list(enumerate(runs, 1))[: bench.size(9, 3)]):
        with bench.attempt(section, (algorithm, number)):
            seconds, error = _seconds(bench, algorithm, options)
            own = floor if algorithm == "gptq" else 0.0
            times = f"{seconds / own:.1f}" if own else ""
            section.add(algorithm, number, f"{seconds:.2f}", f"{own:.2f}" if own else "", times,
                        f"{BLOCKS * seconds / 60:.1f} min", "" if error is None else f"{error:.1e}")  # fmt: skip
    section.notes.append("the first run compiles and warms up; the blocks of a model are alike and one is worked on at "
                         "a time, so a model takes 32 times as long: the blocks of a stream are evidence")  # fmt: skip
    section.notes.append("autoround: 20 of its 200 iterations")
    return section


def _floor(bench: Bench) -> dict[str, float]:
    edge = bench.size(8192, 32)
    left, right = (torch.randn(edge, edge, device=bench.device) for _ in range(2))
    rates = {"fp32": 2 * edge**3 / bench.seconds([lambda: left @ right]), "bf16": bench.ceilings.get("bf16", 1e9)}
    return on_cpu.floor(bench.size(TOKENS, 64), bench.size(LENGTH, 32), rates)


def _seconds(bench: Bench, algorithm: str, options: dict[str, Any]) -> tuple[float, float | None]:
    """Seconds, and the relative squared error of the block's output if there was calibration."""
    model = nn.Module()
    model.layers = nn.ModuleList([_block(bench)])
    layers = linears(model.layers[0], "layers.0")
    schemes: dict[str, LayerScheme] = dict.fromkeys(layers, parse("w4g128"))
    method = make_method(algorithm, options)
    flow = _flow(bench) if method.algorithm.calibrated else None
    work = BlockWork(name="layers.0", model=model, blocks=(model.layers[0],), layers=layers, schemes=schemes,
                     methods=dict.fromkeys(layers, method), flow=flow, seed=0)  # fmt: skip
    bench.wait()
    started = time.perf_counter()
    result = quantize_block(work)
    bench.wait()
    return time.perf_counter() - started, result.output_error


def _block(bench: Bench) -> nn.Module:
    if not bench.is_dry:
        return on_cpu.make_block().to(bench.device)
    config = on_cpu.LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1)
    return on_cpu.LlamaDecoderLayer(config, 0).eval()


def _flow(bench: Bench) -> Flow:
    """The calibration inputs of the block, on the device."""
    if bench.is_dry:
        config = on_cpu.LlamaConfig(hidden_size=64, intermediate_size=96, num_attention_heads=2, num_key_value_heads=1)
        inputs = (torch.randn(1, 32, 64), torch.randn(1, 32, 64))
        places = torch.arange(32)[None]
        turns = on_cpu.LlamaRotaryEmbedding(config)(inputs[0], places)
        fields: dict[str, Any] = {"position_ids": places, "position_embeddings": turns, "use_cache": False}
        return Flow(inputs, ((BlockCall((), fields, None),) * 2,), (0, 1))
    flow = _made_flow()
    call = flow.calls[0][0]
    fields = {name: _moved(value, bench.device) for name, value in call.keywords.items()}
    inputs = tuple(x.to(bench.device) for x in flow.inputs)
    return Flow(inputs, ((BlockCall((), fields, None),) * len(inputs),), tuple(range(len(inputs))))


@cache
def _made_flow() -> Flow:
    """Made once: drawing its numbers takes a processor seconds."""
    return on_cpu.make_flow(TOKENS, LENGTH)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_moved(each, device) for each in value)
    return value.to(device) if isinstance(value, torch.Tensor) else value
