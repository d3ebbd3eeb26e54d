"""Block tasks outside a stream: one block of a model in memory, as equalizers and tuners get it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from bitwright.core.scheme_names import parse
from bitwright.models.blocks import find_blocks, linears
from bitwright.quantization.capture import capture, run_block
from bitwright.quantization.stages import BlockTask
from bitwright.quantization.statistics import collect_statistics

__all__ = ["make_task"]


@torch.no_grad()
def make_task(
    model: nn.Module,
    samples: Sequence[Tensor],
    scheme: str,
    *,
    block: int = 0,
    excluded: Collection[str] = (),
    seed: int = 0,
) -> BlockTask:
    """The task of block number ``block``, whose inputs are those of the float model for ``samples`` (token ids).

    ``excluded``: last parts of the names of linear layers that stay in floating point.
    """
    blocks = find_blocks(model)
    captured = capture(model, blocks, [partial(model, sample) for sample in samples])
    inputs = captured.inputs
    for number in range(block):
        inputs = tuple(
            run_block(blocks.modules[number], hidden, call)
            for hidden, call in zip(inputs, captured.calls[number], strict=True)
        )
    name, module, calls = blocks.names()[block], blocks.modules[block], captured.calls[block]
    found = linears(module, name)
    layers = {path: layer for path, layer in found.items() if path.rpartition(".")[2] not in excluded}

    def run_on(hidden: Tensor, sample: int) -> Tensor:
        return run_block(module, hidden, calls[sample])

    def run(sample: int) -> Tensor:
        return run_on(inputs[sample], sample)

    observed = collect_statistics(layers, [partial(run, number) for number in range(len(inputs))], with_gram=False)
    return BlockTask(
        name=name,
        block=module,
        layers=layers,
        linears=dict.fromkeys(layers, parse(scheme)),
        sites=observed.sites,
        statistics=observed.statistics,
        inputs=inputs,
        reference_inputs=inputs,
        run=run,
        run_on=run_on,
        seed=seed,
    )
