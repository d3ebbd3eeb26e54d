"""Drives bitwright's native decoder: CHECKPOINT THREADS HEAD, where HEAD is a scheme, or "stored"."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from driving import CONTEXT, serve

from bitwright.core.scheme_names import parse
from bitwright.models.decoder import Step
from bitwright.models.decoder_native import NativeDecoder
from bitwright.models.loading import load
from bitwright.models.paged_cache import PAGE

__all__: list[str] = []


class Bitwright:
    def __init__(self, directory: Path, head: str) -> None:
        scheme = None if head == "stored" else parse(head)
        self._decoder = NativeDecoder(load(directory), head=scheme, release=True)
        self._cache = self._decoder.new_cache(128)

    def prefill(self, tokens: int) -> None:
        self._lengths = [0]
        self._run(tokens)

    def start(self, sequences: int) -> None:
        self._lengths = [0] * sequences
        self._run(CONTEXT)

    def step(self) -> None:
        self._run(1)

    def _run(self, count: int) -> None:
        before, number = self._lengths, len(self._lengths)
        self._lengths = [length + count for length in before]
        most = 128 // number
        assert max(self._lengths) <= most * PAGE
        step = Step(
            tokens=torch.randint(3, 1000, (number * count,)),
            positions=torch.cat([torch.arange(length, length + count, dtype=torch.int32) for length in before]),
            starts=torch.arange(number + 1, dtype=torch.int32) * count,
            lengths=torch.tensor(self._lengths, dtype=torch.int32),
            pages=torch.arange(number * most, dtype=torch.int32).view(number, most),
            outputs=torch.arange(1, number + 1, dtype=torch.int32) * count - 1,
        )
        logits = self._decoder.forward(step, self._cache)
        assert logits.shape[0] == number


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    serve(Bitwright(Path(sys.argv[1]), sys.argv[3]))
