"""How far a block's output is from that of the float block: the loss of every pass that tunes one block."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from bitwright.quantization.stages import BlockTask

__all__ = ["BlockLoss"]


class BlockLoss:
    """The mean squared difference between a block's outputs and the float block's on the reference inputs.

    To be made while the block still holds its float layers: their outputs are computed here, once, and kept.
    Samples are run several at a time where they are alike, and that gives the same.

    Attributes:
        count: of samples.
        dtype: in which the block computes.
    """

    def __init__(self, task: BlockTask, *, on_float_inputs: bool = False) -> None:
        self.task = task
        self.inputs = task.reference_inputs if on_float_inputs else task.inputs
        self.count, self.dtype = len(self.inputs), self.inputs[0].dtype
        with torch.no_grad():
            self.wanted = [task.run_on(hidden, sample) for sample, hidden in enumerate(task.reference_inputs)]
            self.joins = task.alike and self.count > 1 and self._is_run_together()

    def backward(self, batch: Sequence[int]) -> float:
        """Add the gradient of the batch's mean loss to the leaves; return the loss."""
        total = 0.0
        for part in self._parts(batch):
            loss = self._of(part) * (len(part) / len(batch))
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    @torch.no_grad()
    def mean(self, batch: Sequence[int] | None = None, size: int = 8) -> float:
        """The mean loss over ``batch``, or all samples."""
        samples = range(self.count) if batch is None else batch
        starts = range(0, len(samples), size)
        parts = [part for start in starts for part in self._parts(samples[start : start + size])]
        return sum(float(self._of(part)) * len(part) for part in parts) / len(samples)

    def _of(self, part: Sequence[int]) -> Tensor:
        found = self.task.run_on(_joined(self.inputs, part), part[0])
        return functional.mse_loss(found.to(torch.float32), _joined(self.wanted, part).to(torch.float32))

    def _parts(self, batch: Sequence[int]) -> list[Sequence[int]]:
        return [batch] if self.joins else [[sample] for sample in batch]

    def _is_run_together(self) -> bool:
        """Whether two samples in one batch give what each gives alone: the masks of some models are for one sample."""
        pair = range(2)
        expected = _joined(self.wanted, pair).to(torch.float32)
        try:
            found = self.task.run_on(_joined(self.task.reference_inputs, pair), 0).to(torch.float32)
        except (RuntimeError, ValueError):
            return False
        return found.shape == expected.shape and float((found - expected).norm()) <= 0.02 * float(expected.norm())


def _joined(tensors: Sequence[Tensor], part: Sequence[int]) -> Tensor:
    return torch.cat([tensors[sample] for sample in part]) if len(part) > 1 else tensors[part[0]]
