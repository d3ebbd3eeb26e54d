"""The block stream: one block in memory at a time, from float weights to quantized tensors.

For each block: collect the statistics of its input sites, equalize, round, tune, swap the quantized layers in, and run
the quantized block to make the next block's inputs. Without calibration only the rounding is left of that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from bitwright.quantization.algorithms import Method
from bitwright.quantization.capture import BlockCall, run_block
from bitwright.quantization.concurrency import map_layers
from bitwright.quantization.decoded import decoded
from bitwright.quantization.rows import layer_row
from bitwright.quantization.rtn import RtnOptions, round_to_nearest
from bitwright.quantization.stages import BlockTask, Rounded
from bitwright.quantization.statistics import NonFiniteActivations, Observed, SiteStatistics, collect_statistics

__all__ = ["BlockResult", "BlockWork", "Flow", "block_seed", "quantize_block", "quantized_linear", "round_layers"]

COMPARED_SAMPLES = 8  # a block's output error is measured on so many samples, to bound what is kept
NOTHING_OBSERVED = Observed({}, ())


@dataclass(frozen=True, slots=True)
class Flow:
    """The calibration samples as they stand before a block, or before several that are worked on together.

    Attributes:
        inputs: the first block's hidden states, one tensor a sample.
        calls: how the model calls each block: ``calls[block][sample]``.
        numbers: the samples' own numbers, which stay when one of them is left out.
        references: the hidden states at this place in the float model, where an algorithm asks for them.
    """

    inputs: tuple[Tensor, ...]
    calls: tuple[tuple[BlockCall, ...], ...]
    numbers: tuple[int, ...]
    references: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockWork:
    """What is to be done: ``layers`` of loaded ``blocks`` of ``model``, by full name, each by its scheme and method.

    ``swap``: whether the quantized layers take the place of the float ones; where nothing runs them, that is wasted.
    """

    name: str
    model: nn.Module
    blocks: tuple[nn.Module, ...]
    layers: Mapping[str, nn.Module]
    schemes: Mapping[str, LayerScheme]
    methods: Mapping[str, Method]
    flow: Flow | None
    seed: int
    swap: bool = True

    def run_on(self, hidden: Tensor, sample: int) -> Tensor:
        """The blocks' output for other hidden states, with the masks and positions of ``sample``."""
        assert self.flow is not None
        for block, calls in zip(self.blocks, self.flow.calls, strict=True):
            hidden = run_block(block, hidden, calls[sample])
        return hidden

    def run(self, sample: int) -> Tensor:
        """The blocks' output for a sample, as they are now."""
        assert self.flow is not None
        return self.run_on(self.flow.inputs[sample], sample)

    def by_method(self) -> list[tuple[Method, tuple[str, ...]]]:
        """The layers of each method, in the order in which the methods first appear."""
        groups: dict[int, list[str]] = {}
        for name in self.layers:
            groups.setdefault(id(self.methods[name]), []).append(name)
        return [(self.methods[names[0]], tuple(names)) for names in groups.values()]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockResult:
    """``rows``: of the report; ``input_scales``: what multiplies layers' inputs at run time; ``outputs`` and
    ``references``: the next block's inputs, and those of the float model, if calibrated."""

    tensors: Mapping[str, QuantizedTensor]
    rows: Mapping[str, Mapping[str, Any]]
    input_scales: Mapping[str, Tensor]
    outputs: tuple[Tensor, ...]
    references: tuple[Tensor, ...] | None
    output_error: float | None


def block_seed(seed: int, name: str) -> int:
    """A seed for one block, whatever was done before it: the same after a resumption as in one go."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big") >> 1


@torch.no_grad()
def quantize_block(work: BlockWork) -> BlockResult:
    """Quantize the layers of loaded blocks, and leave the quantized layers in them if ``work.swap``.

    Raises:
        NonFiniteActivations: naming the sample and the layer.
        BitwrightError: BW602 for weights that are not finite; the layer is named.
    """
    references = _float_outputs(work)
    observed, outputs = _observe(work)
    scales: dict[str, Tensor] = {}
    with ExitStack() as multiplied:
        for method, names in work.by_method():
            for equalizer in method.algorithm.equalize:
                found = equalizer.run(_task(work, names, observed), method.options[equalizer.name])
                for name, scale in found.items():
                    multiplied.enter_context(_multiplied_input(work.layers[name], scale))
                    scales[name] = scale * scales[name] if name in scales else scale
                # The inputs of the sites are scaled now; what was measured before no longer describes them.
                observed = _observe(work, sites=_split_sites(observed.sites, scales))[0]
        tensors: dict[str, QuantizedTensor] = {}
        rows: dict[str, Mapping[str, Any]] = {}
        for method, names in work.by_method():
            rounded, statistics = _round(work, method, names, observed, scales)
            made: Mapping[str, QuantizedTensor] = {name: rounded[name].tensor for name in names}
            for tuner in method.algorithm.tune:
                made = tuner.run(_task(work, names, observed), made, method.options[tuner.name])
            measured = _measure(work, made, statistics)
            for name in names:
                rows[name] = {**measured[name], **_note_of(method, work), **rounded[name].notes}
                tensors[name] = made[name]
    for name, tensor in tensors.items() if work.swap else ():
        _put(work, name, quantized_linear(work.layers[name], tensor, work.schemes[name], scales.get(name)))
    results = _outputs(work)
    error = _relative_square(outputs, results) if outputs else None
    return BlockResult(
        tensors=tensors, rows=rows, input_scales=scales, outputs=results, references=references, output_error=error
    )


def round_layers(
    layers: Mapping[str, nn.Module],
    schemes: Mapping[str, LayerScheme],
    methods: Mapping[str, Method],
    statistics: Mapping[str, SiteStatistics],
    *,
    is_calibrated: bool,
) -> dict[str, Rounded]:
    """Round each layer's weight. A layer that no token of the calibration data reached is rounded to nearest.

    Raises:
        BitwrightError: whatever the rounder raises, with the layer's name.
    """

    def round_layer(name: str) -> Rounded:
        weight, scheme, method = linear_weight(layers[name]), schemes[name].weight, methods[name]
        if is_calibrated and method.algorithm.calibrated and name not in statistics:
            nearest = round_to_nearest(weight, None, scheme, RtnOptions())
            return Rounded(nearest, {"calibration_tokens": 0, "rounded_by": "rtn"})
        stage = method.algorithm.round
        try:
            made = stage.run(weight, statistics.get(name), scheme, method.options[stage.name])
        except BitwrightError as error:
            suggestion = "check the layer's weights" if error.code == "BW602" else error.suggestion
            what = f"{name}: {error.what}"
            raise BitwrightError(error.code, what, where=error.where, why=error.why, suggestion=suggestion) from None
        return made if isinstance(made, Rounded) else Rounded(made)

    if is_calibrated:  # products of large matrices, which use all threads by themselves
        return _round_in_turn(round_layer, list(layers), statistics)
    return map_layers(round_layer, _sizes(layers))


def _round_in_turn(
    round_layer: Callable[[str], Rounded], names: Sequence[str], statistics: Mapping[str, SiteStatistics]
) -> dict[str, Rounded]:
    """Round one layer after the other; a factorization is forgotten once the layers of its site are done."""
    rounded: dict[str, Rounded] = {}
    for name, following in zip(names, [*names[1:], ""], strict=False):
        rounded[name] = round_layer(name)
        if name in statistics and statistics.get(following) is not statistics[name]:
            statistics[name].factored = None
    return rounded


def quantized_linear(
    layer: nn.Module, tensor: QuantizedTensor, scheme: LayerScheme, input_scale: Tensor | None = None
) -> QuantizedLinear:
    """What runs in place of ``layer``."""
    bias = layer.bias.detach() if isinstance(layer.bias, Tensor) else None
    return QuantizedLinear.build(tensor, bias, scheme, input_scale)


def _round(
    work: BlockWork, method: Method, names: Sequence[str], observed: Observed, scales: Mapping[str, Tensor]
) -> tuple[dict[str, Rounded], Mapping[str, SiteStatistics]]:
    """Round the layers of one method: all from one observation, or site by site behind rounded predecessors."""
    options = method.options[method.algorithm.round.name]
    if work.flow is None or not getattr(options, "true_sequential", False):
        layers = {name: work.layers[name] for name in names}
        is_calibrated = work.flow is not None
        rounded = round_layers(layers, work.schemes, work.methods, observed.statistics, is_calibrated=is_calibrated)
        return rounded, observed.statistics
    return _round_in_sequence(work, method, names, observed, scales)


def _round_in_sequence(
    work: BlockWork, method: Method, names: Sequence[str], observed: Observed, scales: Mapping[str, Tensor]
) -> tuple[dict[str, Rounded], Mapping[str, SiteStatistics]]:
    """Site by site in the order in which they run, each on what its rounded predecessors make of the inputs."""
    assert work.flow is not None
    forwards = [partial(work.run, sample) for sample in range(len(work.flow.inputs))]
    gram, numbers = method.algorithm.with_gram, work.flow.numbers
    rounded: dict[str, Rounded] = {}
    statistics: dict[str, SiteStatistics] = {}
    seen = [name for site in observed.sites for name in site if name in names]
    sites = [[name for name in site if name in names] for site in observed.sites]
    for site in [*filter(None, sites), [name for name in names if name not in seen]]:
        layers = {name: work.layers[name] for name in site}
        found = collect_statistics(layers, forwards, with_gram=gram, numbers=numbers, sites=observed.sites, complete=0)
        statistics |= found.statistics
        rounded |= round_layers(layers, work.schemes, work.methods, found.statistics, is_calibrated=True)
        for name in site:
            tensor, scale = rounded[name].tensor, scales.get(name)
            _put(work, name, quantized_linear(work.layers[name], tensor, work.schemes[name], scale))
    for name in names:
        _put(work, name, work.layers[name])
    return {name: rounded[name] for name in names}, statistics


def _task(work: BlockWork, names: Sequence[str], observed: Observed) -> BlockTask:
    sites = (tuple(name for name in site if name in names) for site in observed.sites)
    inputs = work.flow.inputs if work.flow is not None else ()
    references = work.flow.references if work.flow is not None else None
    return BlockTask(
        name=work.name,
        block=work.blocks[0] if len(work.blocks) == 1 else nn.ModuleList(work.blocks),
        layers={name: work.layers[name] for name in names},
        linears={name: work.schemes[name] for name in names},
        sites=tuple(filter(None, sites)),
        statistics={name: entry for name, entry in observed.statistics.items() if name in names},
        inputs=inputs,
        reference_inputs=inputs if references is None else references,
        run=work.run,
        run_on=work.run_on,
        seed=block_seed(work.seed, work.name),
        alike=work.flow is not None and _are_alike(work.flow),
    )


def _are_alike(flow: Flow) -> bool:
    """Whether all samples are one row of one length, and blocks are called the same way for each (equal calls are one
    object, see :func:`.capture.capture`)."""
    shapes = {hidden.shape for hidden in flow.inputs}
    one_shape = len(shapes) == 1 and next(iter(shapes))[0] == 1
    return one_shape and all(call is calls[0] for calls in flow.calls for call in calls)


def _observe(work: BlockWork, sites: Sequence[Sequence[str]] | None = None) -> tuple[Observed, tuple[Tensor, ...]]:
    """Statistics of the layers' inputs, and the blocks' outputs for the first samples, as the blocks are now."""
    if work.flow is None:
        return NOTHING_OBSERVED, ()
    outputs: list[Tensor] = []

    def forward(sample: int) -> None:
        output = work.run(sample)
        if sample < COMPARED_SAMPLES:
            outputs.append(output)

    forwards = [partial(forward, sample) for sample in range(len(work.flow.inputs))]
    with_gram = any(method.algorithm.with_gram for method, _ in work.by_method())
    numbers = work.flow.numbers
    observed = collect_statistics(
        work.layers, forwards, with_gram=with_gram, numbers=numbers, sites=sites, complete=COMPARED_SAMPLES
    )
    return observed, tuple(outputs)


def _float_outputs(work: BlockWork) -> tuple[Tensor, ...] | None:
    """What the float blocks make of the float model's hidden states, where some algorithm wants those."""
    if work.flow is None or work.flow.references is None:
        return None
    outputs = tuple(work.run_on(hidden, sample) for sample, hidden in enumerate(work.flow.references))
    _refuse_nonfinite(outputs, work.flow.numbers, f"at the output of {work.name}")
    return outputs


def _refuse_nonfinite(outputs: Sequence[Tensor], numbers: Sequence[int], where: str) -> None:
    for position, (output, number) in enumerate(zip(outputs, numbers, strict=True)):
        if not torch.isfinite(output).all():
            raise NonFiniteActivations(position, number, where)


def _outputs(work: BlockWork) -> tuple[Tensor, ...]:
    """What the quantized blocks make of each sample."""
    if work.flow is None:
        return ()
    with decoded(work.model, {name: linear_weight(layer).dtype for name, layer in work.layers.items()}):
        outputs = tuple(map(work.run, range(len(work.flow.inputs))))
    _refuse_nonfinite(outputs, work.flow.numbers, f"at the output of the quantized {work.name}")
    return outputs


@contextmanager
def _multiplied_input(layer: nn.Module, scale: Tensor) -> Iterator[None]:
    """Multiply what ``layer`` reads by ``scale`` (``[in]``)."""

    def multiply(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ((inputs[0] * scale).to(inputs[0].dtype), *inputs[1:])

    hook: Any = layer.register_forward_pre_hook(multiply)
    try:
        yield
    finally:
        hook.remove()


def _measure(
    work: BlockWork, tensors: Mapping[str, QuantizedTensor], statistics: Mapping[str, SiteStatistics]
) -> dict[str, dict[str, Any]]:
    """The report's row of each layer."""

    def measure(name: str) -> dict[str, Any]:
        return layer_row(work.layers[name], tensors[name], work.schemes[name], statistics.get(name))

    return map_layers(measure, _sizes({name: work.layers[name] for name in tensors}))


def _sizes(layers: Mapping[str, nn.Module]) -> dict[str, int]:
    return {name: linear_weight(layer).numel() for name, layer in layers.items()}


def _split_sites(sites: Sequence[Sequence[str]], scales: Mapping[str, Tensor]) -> list[list[str]]:
    """Layers whose inputs are multiplied by different vectors no longer read the same."""
    parts: dict[tuple[int, bytes], list[str]] = {}
    for number, site in enumerate(sites):
        for name in site:
            scale = scales.get(name)
            parts.setdefault((number, b"" if scale is None else scale.cpu().numpy().tobytes()), []).append(name)
    return list(parts.values())


def _note_of(method: Method, work: BlockWork) -> dict[str, Any]:
    """The row's word on the algorithm, where a block has several."""
    return {"algorithm": method.name} if len(work.by_method()) > 1 else {}


def _put(work: BlockWork, name: str, module: nn.Module) -> None:
    set_module(work.model, name, module)


def _relative_square(reference: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> float:
    error = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(outputs, reference, strict=False))
    return error / max(1e-300, sum(float(a.double().square().sum()) for a in reference))
