"""The whole engine, greedy: its decoder's steps, and what planning, fetching logits and choosing add to them."""

from __future__ import annotations

import time

import torch

from benchmarks.gpu_runs.decoding import layer_error, on_the_device, single_tokens
from benchmarks.gpu_runs.shapes import make_model
from benchmarks.gpu_runs.timing import Bench, Section
from bitwright.core.kv_scheme import parse_kv
from bitwright.engine.engine import Engine
from bitwright.models.decoder_cuda import CudaDecoder
from bitwright.models.paged_cache import PAGE

__all__ = ["measure_serving"]

CONTEXT = 1024
MORE = 64  # steps that a long run has more than a short one
COLUMNS = ("model", "weights", "cache", "batch", "tokens/s", "ms/step", "decoder and argmax ms/step", "times as long",
           "error of a layer")  # fmt: skip


def measure_serving(bench: Bench) -> Section:
    """Steps of single tokens at 1024 tokens of context: what a long run takes beyond a short one."""
    section = bench.begin("decoding by the whole engine", COLUMNS)
    name, scheme, kv = "llama-3-8b", "w4g128", "int8"
    error = float("nan")
    with bench.attempt(section, "error"), on_the_device(bench):
        error = layer_error(bench, name, scheme, kv)
    with on_the_device(bench):
        model = make_model(bench, name, scheme)
        for batch in bench.within(section, (1, bench.size(64, 2))):
            with bench.attempt(section, batch):
                step = _decoder_seconds(bench, model, kv, batch)
                whole = _engine_seconds(bench, model, kv, batch)
                section.add(name, scheme, kv, batch, f"{batch / whole:.0f}", f"{1e3 * whole:.2f}", f"{1e3 * step:.2f}",
                            f"{whole / step:.2f}", f"{error:.1e}")  # fmt: skip
        del model
    section.notes.append("error: of the logits of a model of one layer, against the same numbers in float64")
    section.notes.append("an engine fetches the logits of every row, and the processor chooses among them")
    return section


def _decoder_seconds(bench: Bench, model: torch.nn.Module, kv: str, batch: int) -> float:
    """A step of the decoder alone, whose tokens are chosen on the GPU."""
    context = bench.size(CONTEXT, 33)
    decoder = CudaDecoder(model)  # type: ignore[arg-type]
    cache = decoder.new_cache(batch * -(-context // PAGE), parse_kv(kv))
    step = single_tokens(batch, context, decoder.shape.vocabulary)
    return bench.host_seconds(lambda: decoder.forward_there(step, cache).argmax(-1).tolist())


def _engine_seconds(bench: Bench, model: torch.nn.Module, kv: str, batch: int) -> float:
    """A step of an engine: of two runs on prompts that it knows, the difference is steps of single tokens alone."""
    context, short, more = bench.size(CONTEXT, 33), bench.size(9, 2), bench.size(MORE, 1)
    length = context + short + more
    room = batch * -(-(length + 1) // PAGE) * PAGE
    with Engine(model, decoder="cuda", kv_cache=kv, kv_safety="off", max_batch=batch, max_length=length,  # type: ignore[arg-type]
                cache_tokens=room) as engine:  # fmt: skip
        vocabulary = int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
        prompts = torch.randint(0, vocabulary, (batch, context)).tolist()
        seconds = {}
        for tokens in (short + more, short, short + more):  # the first compiles, records, and fills the cache
            started = time.perf_counter()
            engine.generate(prompts, max_tokens=tokens, temperature=0, ignore_end=True)
            seconds[tokens] = time.perf_counter() - started
    return max(1e-9, (seconds[short + more] - seconds[short]) / more)
