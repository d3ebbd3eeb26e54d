"""GPTQ, and what else there is, on one Llama-3-8B-shaped block: seconds per stage against what the arithmetic needs.

The block (hidden 4096, intermediate 14336, 32 heads, 8 key-value heads, bf16) has random weights; its inputs are random
too, but with channels of different strength, correlations and a mean. It is worked on by the same function that streams
a model, so collecting, rounding, replacing and propagating are all in the wall time. The floor is the number of
operations that cannot be left out, at the rates of this machine's own products, measured in the same run: two forward
passes, ``xT x`` on and above the diagonal for each distinct input, one Cholesky factorization and one triangular
inversion for each, and the updates of the weights. On a machine that others use, too, wall seconds say little; the same
ratio is therefore also given in processor seconds (``times_processor_floor``).

    python -m benchmarks.block --tokens 65536 --json benchmarks/results/block.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from bitwright.core.scheme import LayerScheme
from bitwright.core.scheme_names import parse
from bitwright.models.blocks import linears
from bitwright.quantization import hessian, hessian_products, stream
from bitwright.quantization.algorithms import ALGORITHMS, make_method
from bitwright.quantization.capture import BlockCall
from bitwright.quantization.stream import BlockWork, Flow, quantize_block

HIDDEN, INTERMEDIATE, HEADS, KEY_HEADS = 4096, 14336, 32, 8
FIELDS = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_attention_heads": HEADS}
INPUTS = {HIDDEN: 3, INTERMEDIATE: 1}  # distinct inputs of linear layers, by width
NARROW = HIDDEN // HEADS * KEY_HEADS
MATRICES = ((HIDDEN, HIDDEN, 2), (NARROW, HIDDEN, 2), (INTERMEDIATE, HIDDEN, 2), (HIDDEN, INTERMEDIATE, 1))  # [out, in]


def make_block(seed: int = 0) -> nn.Module:
    """A decoder layer of normal random weights, bf16."""
    config = LlamaConfig(**FIELDS, num_key_value_heads=KEY_HEADS, num_hidden_layers=1, attn_implementation="sdpa")
    torch.manual_seed(seed)
    with torch.device("meta"):
        block = LlamaDecoderLayer(config, 0).to(torch.bfloat16)
    block.to_empty(device="cpu")
    for parameter in block.parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
        else:
            nn.init.normal_(parameter, std=0.02)
    return block.eval()


def make_flow(tokens: int, length: int, seed: int = 0) -> Flow:
    """Hidden states ``[1, length, hidden]`` that are correlated, and how a model calls its block."""
    generator = torch.Generator().manual_seed(seed)
    strength = torch.rand(HIDDEN, generator=generator).pow(2) * 3 + 0.1
    mean = torch.randn(HIDDEN, generator=generator) * 0.3
    mixture = torch.randn(256, HIDDEN, generator=generator) / 16
    inputs = []
    for _ in range(tokens // length):
        common = torch.randn(length, 256, generator=generator) @ mixture
        own = torch.randn(length, HIDDEN, generator=generator)
        inputs.append(((common + own) * strength + mean).to(torch.bfloat16)[None])
    config = LlamaConfig(**FIELDS, num_key_value_heads=KEY_HEADS)
    places = torch.arange(length)[None]
    rotation = LlamaRotaryEmbedding(config)(inputs[0], places)
    call = BlockCall((), {"position_ids": places, "position_embeddings": rotation, "use_cache": False}, None)
    count = len(inputs)
    return Flow(tuple(inputs), ((call,) * count,), tuple(range(count)))


def measure_rates() -> dict[str, list[float]]:
    """Operations per wall and per processor second of the products of the floor, the best of some tries."""
    wide = torch.randn(2048, HIDDEN).to(torch.bfloat16)
    narrow = torch.randn(HIDDEN, HIDDEN).to(torch.bfloat16)
    left, right = torch.randn(2048, 2048), torch.randn(2048, 2048)
    operations = {"bf16": 2 * 2048 * HIDDEN * HIDDEN, "fp32": 2 * 2048**3}
    work: dict[str, Callable[[], Tensor]] = {
        "bf16": lambda: wide @ narrow.t(),
        "fp32": lambda: hessian_products.product(left, right),
    }
    tries = {name: torch.stack([_seconds(work[name]) for _ in range(7)]).amin(0) for name in work}
    return {name: (operations[name] / tries[name]).tolist() for name in work}


def floor(tokens: int, length: int, rates: dict[str, float]) -> dict[str, float]:
    """Seconds that the arithmetic of GPTQ takes at full speed, by part."""
    weights = sum(rows * columns * count for rows, columns, count in MATRICES)
    attention = 4 * tokens * length * HIDDEN
    grams = sum(count * width * (width + 1) * tokens for width, count in INPUTS.items())
    factors = sum(count * 2 * width**3 / 3 for width, count in INPUTS.items())
    updates = sum(count * rows * columns**2 for rows, columns, count in MATRICES)
    parts = {
        "forwards": 2 * (2 * weights * tokens + attention) / rates["bf16"],
        "gram": grams / rates["bf16"],
        "factor": factors / rates["fp32"],
        "updates": updates / rates["fp32"],
    }
    return {**parts, "total": sum(parts.values())}


class Clock:
    """Sums the time spent in functions of other modules, by stage, without that of stages within them.

    Wall seconds, and those of all processors: on a machine that is shared, the latter are what was worked.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, Tensor] = {}
        self._inner: list[Tensor] = []

    def watch(self, place: Any, name: str, stage: str) -> None:
        """Have calls of ``place.name`` counted as ``stage`` from now on."""
        setattr(place, name, self.timed(getattr(place, name), stage))

    def timed(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            self._inner.append(torch.zeros(2, dtype=torch.float64))
            started = now()
            try:
                return function(*arguments, **keywords)
            finally:
                whole = now() - started
                self.seconds[stage] = self.seconds.get(stage, 0.0) + whole - self._inner.pop()
                if self._inner:
                    self._inner[-1] += whole

        return call


def run(algorithm: str, scheme: str, tokens: int, length: int, options: dict[str, Any]) -> dict[str, Any]:
    """Quantize the block once and say where the time went."""
    clock = Clock()
    clock.watch(hessian_products.GramSum, "_multiply", "gram")
    clock.watch(hessian, "factor_upper", "factor")
    clock.watch(stream, "_observe", "collect")
    clock.watch(stream, "_round", "solve")
    clock.watch(stream, "_outputs", "propagate")
    model = nn.Module()
    model.layers = nn.ModuleList([make_block()])
    method = make_method(algorithm, options)
    layers = linears(model.layers[0], "layers.0")
    stored = parse(scheme)
    schemes: dict[str, LayerScheme] = dict.fromkeys(layers, stored)
    is_calibrated = method.algorithm.calibrated
    work = BlockWork(
        name="layers.0",
        model=model,
        blocks=(model.layers[0],),
        layers=layers,
        schemes=schemes,
        methods=dict.fromkeys(layers, method),
        flow=make_flow(tokens, length) if is_calibrated else None,
        seed=0,
    )
    started = now()
    result = quantize_block(work)
    whole = now() - started
    clock.seconds["rest"] = whole - sum(clock.seconds.values())
    wall, busy = ({name: round(float(pair[which]), 2) for name, pair in clock.seconds.items()} for which in (0, 1))
    return {
        "algorithm": algorithm,
        "options": options,
        "tokens": tokens if is_calibrated else 0,
        "seconds": round(float(whole[0]), 2),
        "stages": wall,
        "processor_seconds": round(float(whole[1]), 2),
        "processor_stages": busy,
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3),
        "relative_output_error": result.output_error,
        "notes": {name: row["rounded_by"] for name, row in result.rows.items() if "rounded_by" in row},
    }


def now() -> Tensor:
    """Wall and processor seconds."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def _seconds(work: Callable[[], object]) -> Tensor:
    started = now()
    work()
    return now() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=65_536)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--scheme", default="w4g128")
    parser.add_argument("--algorithm", default="gptq", choices=list(ALGORITHMS))
    parser.add_argument("--option", action="append", default=[], metavar="NAME=JSON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="append the record to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pairs = (option.partition("=") for option in arguments.option)
    options = {name: json.loads(value) for name, _, value in pairs}
    before = measure_rates()
    record = run(arguments.algorithm, arguments.scheme, arguments.tokens, arguments.length, options)
    after = measure_rates()
    best = {name: [max(pair) for pair in zip(before[name], after[name], strict=True)] for name in before}
    rates, busy_rates = ({name: pair[which] for name, pair in best.items()} for which in (0, 1))
    record |= {
        "scheme": arguments.scheme,
        "gflops": {name: round(rate / 1e9) for name, rate in rates.items()},
        "gflops_per_processor": {name: round(rate / 1e9) for name, rate in busy_rates.items()},
        "load": [round(load, 1) for load in os.getloadavg()],
        "machine": f"{platform.machine()}, {arguments.threads} threads, torch {torch.__version__}",
        "date": time.strftime("%Y-%m-%d"),
    }
    if record["tokens"]:
        parts = floor(record["tokens"], arguments.length, rates)
        record["floor"] = {name: round(seconds, 2) for name, seconds in parts.items()}
        record["times_floor"] = round(record["seconds"] / parts["total"], 2)
        busy = floor(record["tokens"], arguments.length, busy_rates)
        record["processor_floor"] = {name: round(seconds, 2) for name, seconds in busy.items()}
        record["times_processor_floor"] = round(record["processor_seconds"] / busy["total"], 2)
    for name, value in record.items():
        print(f"{name:>22}  {value}")
    if arguments.json:
        records = json.loads(arguments.json.read_text()) if arguments.json.exists() else []
        arguments.json.write_text(json.dumps([*records, record], indent=2) + "\n")


if __name__ == "__main__":
    main()
