"""What it costs that a row's result does not depend on the rows beside it."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.gpu_runs.decoding import layer_error, on_the_device, single_tokens
from benchmarks.gpu_runs.products import product_errors
from benchmarks.gpu_runs.shapes import MODELS, TINY, kernel_of, make_model, packed
from benchmarks.gpu_runs.timing import Bench, Section
from bitwright.core.kv_scheme import parse_kv
from bitwright.core.scheme_names import parse
from bitwright.kernels.gpu import fp8, integer, linear
from bitwright.kernels.records import KernelSpec
from bitwright.models.decoder_cuda import CudaDecoder
from bitwright.models.paged_cache import PAGE

__all__ = ["measure_invariance"]

RUNS = {linear.KERNEL: linear.run, integer.KERNEL: integer.run, fp8.KERNEL: fp8.run}
COLUMNS = ("what", "scheme", "rows", "us", "invariant us", "times as long", "alone and in company",
           "error of the invariant")  # fmt: skip
CONTEXT = 1024
LAYERS = 4


def measure_invariance(bench: Bench) -> Section:
    """Products and steps of decoding with ``invariant`` and without it."""
    section = bench.begin("cost of batch invariance", COLUMNS)
    schemes = ("w4g128", "w8a8", "w4g128-a8", "fp8-afp8")[: bench.size(9, 2)]
    cases = [(scheme, rows) for scheme in schemes for rows in (1, bench.size(16, 5), bench.size(512, 18))]
    steps = [("step", batch) for batch in (1, bench.size(64, 2))]
    for what, rows in bench.within(section, [*cases[:3], *steps, *cases[3:]]):
        with bench.attempt(section, (what, rows)):
            if what == "step":
                _add_step(bench, section, rows)
            else:
                _add_product(bench, section, what, rows)
    section.notes.append(
        "alone and in company: whether one row has, with invariant, the same bits alone as among others"
    )
    section.notes.append(f"step: one token a sequence at {CONTEXT} tokens, {LAYERS} layers of llama-3-8b and its head")
    return section


def _add_product(bench: Bench, section: Section, scheme: str, rows: int) -> None:
    layer, shape = parse(scheme), (TINY if bench.is_dry else MODELS["llama-3-8b"]).matrices["qkv"]
    kernel = kernel_of(layer)
    spec = KernelSpec(scheme=layer, shape=shape, device=bench.device)
    reason = None if bench.is_dry else kernel.refuse(spec)
    if reason is not None:
        section.notes.append(f"{scheme}: {reason}")
        return
    run, weight = RUNS[kernel], packed(scheme, shape, bench.device)
    x = torch.randn(rows, shape[1], device=bench.device).to(bench.dtype)
    nbytes = sum(tensor.nbytes for tensor in weight.tensors.values())
    copies = [weight, *(packed(scheme, shape, bench.device) for _ in range(bench.copies(nbytes) - 1))]
    free, fixed = (
        bench.seconds([partial(run, x, one, None, invariant=invariant) for one in copies])
        for invariant in (False, True)
    )
    is_equal = torch.equal(run(x, weight, invariant=True)[-1:], run(x[-1:], weight, invariant=True))
    dense = kernel.unpack(weight).dequantize(bench.dtype)
    error, _ = product_errors(x, weight, run(x, weight, invariant=True), dense)
    _add(section, f"{shape[0]} x {shape[1]}", scheme, rows, free, fixed, is_equal, error)


def _add_step(bench: Bench, section: Section, batch: int) -> None:
    context = bench.size(CONTEXT, 33)
    with on_the_device(bench):
        model = make_model(bench, "llama-3-8b", "w4g128", layers=bench.size(LAYERS, 1))
        seconds, is_equal = [], False
        for invariant in (False, True):
            decoder = CudaDecoder(model, invariant=invariant)
            cache = decoder.new_cache(batch * -(-context // PAGE), parse_kv("int8"))
            step = single_tokens(batch, context, decoder.shape.vocabulary)
            seconds.append(bench.host_seconds(partial(decoder.forward_there, step, cache)))
            together = decoder.forward(step, cache)[:1]
            first = single_tokens(1, context, decoder.shape.vocabulary)
            first.tokens[:] = step.tokens[:1]
            is_equal = torch.equal(decoder.forward(first, cache), together)
            del decoder, cache
        error = layer_error(bench, "llama-3-8b", "w4g128", "int8", invariant=True)
        _add(section, "step", "w4g128, int8", batch, seconds[0], seconds[1], is_equal, error)


def _add(section: Section, what: str, scheme: str, rows: int, free: float, fixed: float, is_equal: bool,
         error: float) -> None:  # fmt: skip
    section.add(what, scheme, rows, f"{1e6 * free:.1f}", f"{1e6 * fixed:.1f}", f"{fixed / free:.2f}",
                "equal" if is_equal else "DIFFERENT", f"{error:.1e}")  # fmt: skip
