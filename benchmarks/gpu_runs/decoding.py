"""Whole models of random weights: tokens a second, and what their memory takes beside the figures of the documents."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.gpu_runs.shapes import MODELS, TINY, ModelShape, decoded_double, make_model
from benchmarks.gpu_runs.timing import Bench, Section, relative_error
from bitwright.core.kv_scheme import KVScheme, parse_kv
from bitwright.kernels.gpu import library
from bitwright.models.decoder import Step
from bitwright.models.decoder_cuda import CudaDecoder
from bitwright.models.decoder_torch import TorchDecoder
from bitwright.models.paged_cache import PAGE, CacheShape, PagedCache

__all__ = ["layer_error", "measure_decoding", "measure_memory", "on_the_device", "single_tokens"]

CONTEXT = 1024
GIB, MIB = float(1 << 30), float(1 << 20)
# GB with and without a quantized cache, by batch at 1024 tokens and by length at batch 1: qwen_quantization, A100-80G.
QWEN_BATCHES = {
    1: (16.3, 15.5),
    4: (24.1, 17.2),
    16: (31.7, 22.3),
    32: (48.7, 30.2),
    64: (None, 48.2),
    100: (None, 72.4),
}
QWEN_LENGTHS = {512: (15.2, 15.0), 1024: (16.3, 15.5), 2048: (17.6, 15.8), 4096: (19.5, 16.6), 8192: (23.2, 17.6)}
# MiB with fp16 and int8, by batch at 2048 tokens: lmdeploy_kv_int8, internlm-chat-7b.
LMDEPLOY = {8: (22337, 18241), 16: (30593, 22369), 32: (47073, 30625), 48: (63553, 38881)}


@contextmanager
def on_the_device(bench: Bench) -> Iterator[None]:
    """In a dry run the CPU passes for a GPU. Memory is given back at the end."""
    refuse = library.refuse_device
    if bench.is_dry:
        library.refuse_device = lambda *_: None  # type: ignore[assignment]
    try:
        yield
    finally:
        library.refuse_device = refuse
        gc.collect()
        if not bench.is_dry:
            torch.cuda.empty_cache()


def measure_decoding(bench: Bench) -> Section:
    """Greedy steps at 1024 tokens of context, in graphs, against the time that reading weights and cache takes."""
    columns = (
        "model",
        "weights",
        "cache",
        "batch",
        "tokens/s",
        "ms/step",
        "times bf16",
        "share of the bandwidth floor",
        "weights GiB",
        "error of a layer",
    )
    section = bench.begin("decoding, whole models of random weights", columns)
    cases = [("llama-3-8b", None, "none"), ("llama-3-8b", "w4g128", "int8"), ("llama-3-8b", "w8a8", "int8"),
             ("qwen-7b", None, "none"), ("qwen-7b", "w4g128", "int8"), ("qwen-7b", "w4g128", "int4")]  # fmt: skip
    dense: dict[tuple[str, int], float] = {}  # seconds of a step by model and batch
    for name, scheme, kv in bench.within(section, cases[: bench.size(9, 3)]):
        error = float("nan")
        with bench.attempt(section, f"error of {name} {scheme} {kv}"), on_the_device(bench):
            error = layer_error(bench, name, scheme, kv)
        with bench.attempt(section, (name, scheme, kv)), on_the_device(bench):
            decoder = CudaDecoder(make_model(bench, name, scheme), release=True)
            for batch in (1, 64):
                try:
                    _decode(bench, section, decoder, (name, scheme, kv), batch, error, dense)
                except torch.OutOfMemoryError:
                    section.notes.append(f"{name} {scheme} with {kv} at batch {batch} does not fit")
            del decoder
    section.notes.append("error: of the logits of a model of one layer, against the same numbers in float64 (8-bit "
                         "activations: against those before rounding)")  # fmt: skip
    return section


def layer_error(bench: Bench, name: str, scheme: str | None, kv: str, *, invariant: bool = False) -> float:
    """Of the logits after a prompt and one more token, of a model of one layer."""
    model = make_model(bench, name, scheme, layers=1)
    exact = decoded_double(model)
    tokens = torch.randint(0, model.config.vocab_size, (41,))
    found = []
    for decoder in (CudaDecoder(model, invariant=invariant), TorchDecoder(exact, exact=False)):
        cache = decoder.new_cache(2, parse_kv(kv))
        for first, last in ((0, 40), (40, 41)):
            numbers = torch.arange(first, last, dtype=torch.int32)
            step = Step(
                tokens=tokens[first:last], positions=numbers, starts=torch.tensor([0, last - first], dtype=torch.int32),
                lengths=torch.tensor([last], dtype=torch.int32), pages=torch.tensor([[1, 0]], dtype=torch.int32),
                outputs=torch.tensor([last - first - 1], dtype=torch.int32),
            )  # fmt: skip
            logits = decoder.forward(step, cache)
        found.append(logits)
    return relative_error(found[0], found[1].double())


def _decode(bench: Bench, section: Section, decoder: CudaDecoder, what: tuple[str, str | None, str], batch: int,
            error: float, dense: dict[tuple[str, int], float]) -> None:  # fmt: skip
    name, scheme, kv = what
    count, context = bench.size(batch, min(batch, 2)), bench.size(CONTEXT, 33)
    most = -(-context // PAGE)
    cache = decoder.new_cache(count * most, parse_kv(kv))
    step = single_tokens(count, context, decoder.shape.vocabulary)
    for _ in range(2):
        decoder.forward_there(step, cache).argmax(-1)
    bench.wait()
    repeats, started = bench.size(50, 1), time.perf_counter()
    for _ in range(repeats):
        decoder.forward_there(step, cache).argmax(-1).tolist()  # as greedy decoding: tokens come back every step
    seconds = (time.perf_counter() - started) / repeats
    if scheme is None:
        dense[name, batch] = seconds
    times = f"{dense[name, batch] / seconds:.2f}" if (name, batch) in dense else ""
    head = decoder.shape.vocabulary * decoder.shape.hidden * cache.shape.dtype.itemsize  # the embedding is not read
    read = decoder.weight_bytes() - head + cache.bytes()
    share = read / bench.ceilings.get("copy", torch.inf) / seconds
    section.add(name, scheme or str(bench.dtype)[6:], kv, batch, f"{count / seconds:.0f}", f"{1e3 * seconds:.2f}",
                times, f"{share:.0%}", f"{decoder.weight_bytes() / GIB:.2f}", f"{error:.1e}")  # fmt: skip


def single_tokens(batch: int, context: int, vocabulary: int) -> Step:
    """One new token for each of ``batch`` sequences, the last of ``context``."""
    most = -(-context // PAGE)
    every = torch.arange(batch + 1, dtype=torch.int32)
    return Step(
        tokens=torch.randint(0, vocabulary, (batch,)),
        positions=torch.full((batch,), context - 1, dtype=torch.int32),
        starts=every,
        lengths=torch.full((batch,), context, dtype=torch.int32),
        pages=torch.arange(batch * most, dtype=torch.int32).view(batch, most),
        outputs=every[:-1],
    )


def measure_memory(bench: Bench) -> Section:
    """The documents' tables of memory, with our cache really allocated beside weights of the model's size."""
    columns = ("document", "batch", "tokens", "float: theirs", "ours", "int8: theirs", "ours", "int4: ours", "planned")
    section = bench.begin("memory of weights and cache", columns)
    cases = [("qwen-7b", batch, 1024, figures, GIB, "GB") for batch, figures in QWEN_BATCHES.items()]
    cases += [("qwen-7b", 1, length, figures, GIB, "GB") for length, figures in QWEN_LENGTHS.items()]
    cases += [("llama-7b", batch, 2048, figures, MIB, "MiB") for batch, figures in LMDEPLOY.items()]
    for case in bench.within(section, cases):
        with bench.attempt(section, case):
            _memory_row(bench, section, *case)
    section.notes.append("theirs hold activations, the allocator's reserve and a prompt as well")
    section.notes.append("ours: what the allocator counts for weights and cache; planned: from the sizes alone, int8")
    return section


def _memory_row(bench: Bench, section: Section, model: str, batch: int, length: int,
                figures: tuple[float | None, float | None], unit: float, label: str) -> None:  # fmt: skip
    shape = TINY if bench.is_dry else MODELS[model]
    found, planned = [], 0.0
    for kv in ("none", "int8", "int4"):
        ours, plan = _allocate(bench, shape, parse_kv(kv), bench.size(batch, 1), bench.size(length, 40))
        found.append(_amount(ours / unit, label) if ours else "OOM")
        planned = plan if kv == "int8" else planned
    theirs = ["OOM" if figure is None else _amount(figure, label) for figure in figures]
    section.add(
        model, batch, length, theirs[0], found[0], theirs[1], found[1], found[2], _amount(planned / unit, label)
    )


def _amount(number: float, label: str) -> str:
    return f"{number:.1f} {label}" if label == "GB" else f"{number:.0f} {label}"


def _allocate(bench: Bench, shape: ModelShape, scheme: KVScheme, batch: int, length: int) -> tuple[int, int]:
    """Bytes that the allocator counts with weights and a cache of ``batch`` times ``length`` tokens (0: they did not
    fit), and those of the plan."""
    weights = 2 * (2 * shape.vocabulary * shape.hidden + shape.layers * sum(n * k for n, k in shape.matrices.values()))
    pages = batch * -(-length // PAGE)
    room = CacheShape(
        layers=shape.layers, kv_heads=shape.kv_heads, head_dim=shape.hidden // shape.heads, dtype=bench.dtype
    )
    plan = weights + pages * PagedCache(room, 1, scheme, torch.device("cpu")).bytes()
    before = 0 if bench.is_dry else torch.cuda.memory_allocated()
    try:
        held = torch.empty(weights, dtype=torch.uint8, device=bench.device)
        cache = PagedCache(room, pages, scheme, bench.device)
    except torch.cuda.OutOfMemoryError:
        return 0, plan
    ours = held.nbytes + cache.bytes() if bench.is_dry else torch.cuda.memory_allocated() - before
    del held, cache
    return ours, plan
