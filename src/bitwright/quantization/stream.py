"""The block stream: one block in memory at a time, from float weights to quantized tensors.

For each block: collect the statistics of its input sites, equalize, round, tune, swap the quantized layers in, and run
the quantized block to make the next block's inputs. Without calibration only the rounding is left of that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme import LayerScheme
from bitwright.models.blocks import linear_weight, set_module
from bitwright.models.quantized import QuantizedLinear
from bitwright.quantization.algorithms import Algorithm, BlockTask
from bitwright.quantization.capture import BlockCall, run_block
from bitwright.quantization.statistics import NonFiniteActivations, SiteStatistics, collect_statistics

__all__ = ["BlockResult", "Flow", "block_seed", "layer_row", "quantize_block", "quantized_linear", "round_layers"]

TILE = 1 << 18  # weights compared at a time, so that the float32 copies stay in cache
COMPARED_SAMPLES = 8  # a block's output error is measured on so many samples, to bound what is kept


@dataclass(frozen=True, slots=True)
class Flow:
    """The calibration samples as they stand before a block: its inputs, and how the model calls it.

    ``numbers`` are the samples' own, which stay when one of them is left out.
    """

    inputs: tuple[Tensor, ...]
    calls: tuple[BlockCall, ...]
    numbers: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockResult:
    """``rows``: of the report; ``outputs``: the next block's inputs, if calibrated."""

    tensors: Mapping[str, QuantizedTensor]
    rows: Mapping[str, Mapping[str, Any]]
    outputs: tuple[Tensor, ...]
    output_error: float | None


def block_seed(seed: int, name: str) -> int:
    """A seed for one block, whatever was done before it: the same after a resumption as in one go."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


@torch.no_grad()
def quantize_block(
    task_name: str,
    block: nn.Module,
    layers: Mapping[str, nn.Module],
    schemes: Mapping[str, LayerScheme],
    flow: Flow | None,
    algorithm: Algorithm,
    options: Any,
    seed: int,
) -> BlockResult:
    """Quantize the ``layers`` (by full name) of one loaded block, and leave the quantized layers in it.

    Raises:
        NonFiniteActivations: naming the sample and the layer.
        BitwrightError: BW602 for weights that are not finite; the layer is named.
    """
    run = partial(_run_sample, block, flow)
    statistics, reference = _observe(layers, flow, run, algorithm)
    task = BlockTask(
        name=task_name,
        block=block,
        linears=schemes,
        statistics=statistics,
        inputs=flow.inputs if flow is not None else (),
        run=run,
        seed=block_seed(seed, task_name),
    )
    if algorithm.equalize is not None:
        algorithm.equalize(task, options)
        # The inputs of the sites are scaled now; what was measured before no longer describes them.
        statistics = _observe(layers, flow, run, algorithm)[0]
    tensors, rows = round_layers(layers, schemes, statistics, algorithm, options)
    if algorithm.tune is not None:
        tensors = dict(algorithm.tune(task, tensors, options))
        rows = {name: layer_row(layers[name], tensors[name], schemes[name], statistics.get(name)) for name in tensors}
    for name, tensor in tensors.items():
        set_module(block, name.removeprefix(task_name + "."), quantized_linear(layers[name], tensor, schemes[name]))
    outputs = tuple(run(sample) for sample in range(len(task.inputs)))
    for sample, output in enumerate(outputs):
        if not torch.isfinite(output).all():
            assert flow is not None
            raise NonFiniteActivations(sample, flow.numbers[sample], f"at the output of the quantized {task_name}")
    error = _relative_square(reference, outputs) if reference else None
    return BlockResult(tensors=tensors, rows=rows, outputs=outputs, output_error=error)


def round_layers(
    layers: Mapping[str, nn.Module],
    schemes: Mapping[str, LayerScheme],
    statistics: Mapping[str, SiteStatistics],
    algorithm: Algorithm,
    options: Any,
) -> tuple[dict[str, QuantizedTensor], dict[str, Mapping[str, Any]]]:
    """Round each layer's weight, and measure what that costs."""
    tensors: dict[str, QuantizedTensor] = {}
    rows: dict[str, Mapping[str, Any]] = {}
    for name, scheme in schemes.items():
        try:
            tensors[name] = algorithm.round(linear_weight(layers[name]), statistics.get(name), scheme.weight, options)
        except BitwrightError as error:
            if error.code != "BW602":
                raise
            raise BitwrightError("BW602", f"{name}: {error.what}", suggestion="check the layer's weights") from None
        rows[name] = layer_row(layers[name], tensors[name], scheme, statistics.get(name))
    return tensors, rows


def quantized_linear(layer: nn.Module, tensor: QuantizedTensor, scheme: LayerScheme) -> QuantizedLinear:
    """What runs in place of ``layer``."""
    bias = layer.bias
    return QuantizedLinear.build(tensor, bias.detach() if isinstance(bias, Tensor) else None, scheme)


def layer_row(
    layer: nn.Module, tensor: QuantizedTensor, scheme: LayerScheme, statistics: SiteStatistics | None
) -> dict[str, Any]:
    """The report's row of one layer."""
    weight = linear_weight(layer)
    importance = None if statistics is None else statistics.sum_of_squares
    plain, weighted = _errors(weight, tensor, importance)
    row: dict[str, Any] = {
        "scheme": scheme.name,
        "shape": list(tensor.shape),
        "bits_per_weight": round(tensor.stored_bits() / weight.numel(), 4),
        "relative_error": plain,
    }
    if weighted is not None:
        row["weighted_error"] = weighted
    if statistics is not None and (dead := int((statistics.largest == 0).sum())):
        row["dead_inputs"] = dead  # channels that were zero in every token: calibration says nothing of their weights
    if isinstance(tensor.scale, Tensor) and tensor.scale.dtype != scheme.weight.scale_dtype:
        row["scale_dtype"] = str(tensor.scale.dtype).removeprefix(
            "torch."
        )  # the scheme's would have under- or overflowed
    return row


def _observe(
    layers: Mapping[str, nn.Module], flow: Flow | None, run: Callable[[int], Tensor], algorithm: Algorithm
) -> tuple[dict[str, SiteStatistics], tuple[Tensor, ...]]:
    """Statistics of the layers' inputs, and the block's outputs for the first samples, as the block is now."""
    if flow is None:
        return {}, ()
    outputs: list[Tensor] = []

    def forward(sample: int) -> None:
        output = run(sample)
        if sample < COMPARED_SAMPLES:
            outputs.append(output)

    forwards = [partial(forward, sample) for sample in range(len(flow.inputs))]
    statistics = collect_statistics(layers, forwards, with_gram=algorithm.with_gram, numbers=flow.numbers)
    return statistics, tuple(outputs)


def _run_sample(block: nn.Module, flow: Flow | None, sample: int) -> Tensor:
    assert flow is not None
    return run_block(block, flow.inputs[sample], flow.calls[sample])


def _errors(weight: Tensor, tensor: QuantizedTensor, importance: Tensor | None) -> tuple[float, float | None]:
    """``|W - W'| / |W|`` in the Frobenius norm, and the same with each column weighted by its input's power."""
    difference, size = _square_sums(weight, tensor, 1.0)
    largest = float(weight.abs().amax().to(torch.float32)) if not 1e-20 < float(size.sum()) < 1e30 else 0.0
    if largest:  # float32 squares of such numbers over- or underflow
        difference, size = _square_sums(weight, tensor, largest)
    plain = float((difference.sum() / size.sum().clamp(min=1e-300)).sqrt())
    if importance is None:
        return plain, None
    return plain, float(((difference * importance).sum() / (size * importance).sum().clamp(min=1e-300)).sqrt())


def _square_sums(weight: Tensor, tensor: QuantizedTensor, unit: float) -> tuple[Tensor, Tensor]:
    """Sums of squares of the error and of the weight, by column (float64), in units of ``unit``."""
    difference = torch.zeros(weight.shape[1], dtype=torch.float64)
    size = torch.zeros_like(difference)
    separable = tensor.scheme.axis == 1 and isinstance(tensor.scale, Tensor)
    rebuilt = None if separable else tensor.dequantize()
    count = max(1, TILE // weight.shape[1])
    for start in range(0, weight.shape[0], count):
        rows = slice(start, start + count)
        part = weight[rows].to(torch.float32)
        decoded = tensor.rows(rows).dequantize() if rebuilt is None else rebuilt[rows]
        error = part - decoded
        if unit != 1.0:
            error, part = error / unit, part / unit
        difference += error.square_().sum(0)
        size += part.square().sum(0)
    return difference, size


def _relative_square(reference: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> float:
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(outputs, reference, strict=False))
    return error / max(1e-300, sum(float(a.double().square().sum()) for a in reference))
