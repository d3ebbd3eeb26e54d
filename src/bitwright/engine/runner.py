"""One step: the works of a plan as the tensors that a decoder takes, and the logits that it gives."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from bitwright.engine.scheduler import Work
from bitwright.models.decoder import Decoder, Step
from bitwright.models.paged_cache import PagedCache

__all__ = ["Runner"]


class Runner:
    """A decoder with its cache."""

    def __init__(self, decoder: Decoder, cache: PagedCache) -> None:
        self.decoder, self.cache = decoder, cache

    def run(self, works: Sequence[Work]) -> list[NDArray[np.float32]]:
        """For each work that wants a token the logits after its last token and after each guess; else no rows."""
        step = _step(works)
        counts = [1 + len(work.draft) if work.wants_token else 0 for work in works]
        logits = self.decoder.forward(step, self.cache).numpy()
        return np.split(logits, np.cumsum(counts)[:-1])


def _step(works: Sequence[Work]) -> Step:
    tokens: list[int] = []
    positions: list[int] = []
    outputs: list[int] = []
    starts, lengths = [0], []
    pages = torch.zeros((len(works), max(len(work.request.pages) for work in works)), dtype=torch.int32)
    for row, work in enumerate(works):
        request, first = work.request, work.request.computed
        tokens += request.tokens[first : first + work.count]
        tokens += work.draft
        length = first + work.count + len(work.draft)
        positions += range(first, length)
        if work.wants_token:
            outputs += range(len(tokens) - len(work.draft) - 1, len(tokens))
        starts.append(len(tokens))
        lengths.append(length)
        pages[row, : len(request.pages)] = torch.tensor(request.pages, dtype=torch.int32)
    return Step(
        tokens=torch.tensor(tokens, dtype=torch.int64),
        positions=torch.tensor(positions, dtype=torch.int32),
        starts=torch.tensor(starts, dtype=torch.int32),
        lengths=torch.tensor(lengths, dtype=torch.int32),
        pages=pages,
        outputs=torch.tensor(outputs, dtype=torch.int32),
    )
