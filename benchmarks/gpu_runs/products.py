"""Ceilings of the machine, then products: packed weights against the vendor's dense product of the same shape."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu_runs.shapes import MODELS, TINY, kernel_of, packed
from benchmarks.gpu_runs.timing import Bench, Section, relative_error
from bitwright.core.scheme_names import parse
from bitwright.kernels.records import KernelSpec, PackedWeight

__all__ = ["measure_ceilings", "measure_few_rows", "measure_many_rows", "measure_other_schemes", "product_errors"]

COLUMNS = ("model", "product", "scheme", "rows", "us", "bf16 us", "speedup", "share of copy", "error", "bf16 error")
OTHERS = ("w4g32-asym", "w4", "A16W4", "w3g128", "w2g64", "nf4g64", "fp4e2m1g32", "fp8", "w4a8", "A8W8", "A8W4",
          "fp8-afp8", "w4g128-afp8")  # fmt: skip


def measure_ceilings(bench: Bench) -> Section:
    """What the memory and the matrix units give, with nothing of ours."""
    section = bench.begin("ceilings", ("what", "per second"))
    size = bench.size(1 << 30, 1 << 16)
    source, target = (torch.zeros(size, dtype=torch.uint8, device=bench.device) for _ in range(2))
    bench.ceilings["copy"] = 2 * size / bench.seconds([lambda: target.copy_(source)])
    edge = bench.size(8192, 64)
    left, right = (torch.randn(edge, edge, device=bench.device).to(bench.dtype) for _ in range(2))
    bench.ceilings["bf16"] = 2 * edge**3 / bench.seconds([lambda: left @ right.t()])
    codes = [torch.randint(-127, 128, (edge, edge), dtype=torch.int8, device=bench.device) for _ in range(2)]
    bench.ceilings["int8"] = 2 * edge**3 / bench.seconds([lambda: torch._int_mm(codes[0], codes[1].t())])
    section.add("copy, read and written", f"{bench.ceilings['copy'] / 1e12:.2f} TB")
    section.add("bf16 product, 8192 cubed", f"{bench.ceilings['bf16'] / 1e12:.0f} TFLOP")
    section.add("int8 product, 8192 cubed", f"{bench.ceilings['int8'] / 1e12:.0f} TOP")
    return section


def measure_few_rows(bench: Bench) -> Section:
    """A16W4 and A16W8 while the weight's bytes are what counts."""
    section = bench.begin("few rows: packed weights beside bf16", COLUMNS)
    counts = {"w4g128": (1, 4, 8, 16, 64), "w8": (1, 16), "A16W8": (1,)}
    shapes = _shapes(bench, ("llama-3-8b", "qwen2.5-7b"))
    cases = [(*shape, scheme, rows) for shape in shapes for scheme in counts for rows in counts[scheme]]
    # First what is wanted most, at every shape.
    ordered = sorted(cases, key=lambda case: (case[3] != "w4g128", case[4] > 1))
    for case in bench.within(section, ordered[: bench.size(999, 3)]):
        with bench.attempt(section, case):
            _row(bench, section, *case)
    section.notes.append("wanted: w4g128 at least 80% of copy at 1 to 8 rows, 3.3 times bf16 at 1, never slower to 64; "
                         "8 bits at least 1.8 times at 1")  # fmt: skip
    return section


def measure_many_rows(bench: Bench) -> Section:
    """Prefill: A8W8 on int8 matrix units, A16W4 by unpacking once."""
    section = bench.begin("many rows: prefill beside bf16", COLUMNS)
    counts = {"w8a8": (2048, 8192), "w4g128": (4096, 256, 1024), "w4g128-a8": (2048,), "fp8-afp8": (2048,)}
    shapes = _shapes(bench, ("llama-3-8b", "qwen2.5-7b"))
    cases = [(*shape, scheme, bench.size(rows, 3)) for shape in shapes for scheme in counts for rows in counts[scheme]]
    for case in bench.within(section, sorted(cases, key=lambda case: case[3] not in ("w8a8", "w4g128"))):
        with bench.attempt(section, case):
            _row(bench, section, *case)
    section.notes.append(
        "wanted: w8a8 at least 1.5 times bf16 from 2048 rows on; w4g128 at 4096 at most 1.15 times slower"
    )
    return section


def measure_other_schemes(bench: Bench) -> Section:
    """Every other width and kind, on one product."""
    section = bench.begin("other schemes", COLUMNS)
    shape = next(iter(_shapes(bench, ("llama-3-8b",))))
    for case in bench.within(section, [(*shape, scheme, rows) for scheme in OTHERS for rows in (1, 16)]):
        with bench.attempt(section, case):
            _row(bench, section, *case)
    return section


def _shapes(bench: Bench, models: tuple[str, ...]) -> Iterator[tuple[str, str, tuple[int, int]]]:
    for name in models[: bench.size(9, 1)]:
        shape = TINY if bench.is_dry else MODELS[name]
        for product, size in list(shape.matrices.items())[: bench.size(9, 1)]:
            yield name, product, size


def _row(
    bench: Bench, section: Section, model: str, product: str, shape: tuple[int, int], scheme: str, rows: int
) -> None:
    """Time and error of one product, and of the dense one."""
    layer = parse(scheme)
    reason = (
        None if bench.is_dry else kernel_of(layer).refuse(KernelSpec(scheme=layer, shape=shape, device=bench.device))
    )
    if reason is not None:
        section.notes.append(f"{scheme} on {shape}: {reason}")
        return
    kernel = kernel_of(layer)
    x = torch.randn(rows, shape[1], device=bench.device).to(bench.dtype)
    weight = packed(scheme, shape, bench.device)
    nbytes = sum(tensor.nbytes for tensor in weight.tensors.values())
    dense = kernel.unpack(weight).dequantize(bench.dtype)
    error, dense_error = product_errors(x, weight, kernel.run(x, weight, None), dense)
    ours = bench.cold_seconds(lambda: packed(scheme, shape, bench.device), lambda one: kernel.run(x, one, None), nbytes)
    theirs = bench.cold_seconds(dense.clone, lambda one: x @ one.t(), dense.nbytes)
    moved = nbytes + x.nbytes + rows * shape[0] * x.element_size()
    share = moved / ours / bench.ceilings.get("copy", torch.inf)
    section.add(model, product, scheme, rows, f"{1e6 * ours:.1f}", f"{1e6 * theirs:.1f}", f"{theirs / ours:.2f}",
                f"{share:.0%}", f"{error:.1e}", f"{dense_error:.1e}")  # fmt: skip


def product_errors(x: Tensor, weight: PackedWeight, found: Tensor, dense: Tensor) -> tuple[float, float]:
    """Of a few rows and outputs, against float64 on the weight as it is stored."""
    outputs = slice(0, min(512, weight.shape[0]))
    stored = kernel_of(weight.scheme).unpack(weight).dequantize()[outputs].double()
    rows = slice(0, min(64, x.shape[0]))
    exact = x[rows].double() @ stored.t()
    return relative_error(found[rows, outputs], exact), relative_error((x[rows] @ dense.t())[:, outputs], exact)
