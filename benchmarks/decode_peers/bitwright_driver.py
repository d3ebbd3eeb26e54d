"""Drives bitwright's native decoder: CHECKPOINT THREADS HEAD, where HEAD is a scheme, or "stored"."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from driving import CONTEXT, FILLED, serve

from bitwright.core.kv_scheme import parse_kv
from bitwright.core.scheme_names import parse
from bitwright.models.decoder import Step
from bitwright.models.decoder_native import NativeDecoder
from bitwright.models.direct_loading import open_direct
from bitwright.models.paged_cache import PAGE

__all__: list[str] = []

TOKENS = 4096


class Bitwright:
    def __init__(self, directory: Path, head: str, *, kv: str, tokens: int, kept: Path | None) -> None:
        direct = open_direct(directory)
        assert direct is not None, "the native decoder does not run this"
        self._decoder = NativeDecoder(direct.pack(None if head == "stored" else parse(head), kept))
        self._pages = -(-tokens // PAGE)
        self._cache = self._decoder.new_cache(self._pages, parse_kv(kv))

    def prefill(self, tokens: int) -> None:
        self._lengths = [0]
        self._run(tokens)

    def start(self, sequences: int) -> None:
        self._lengths = [0] * sequences
        self._run(CONTEXT)

    def fill(self, tokens: int) -> None:
        self.prefill(FILLED)
        first = FILLED // PAGE
        cache = self._cache
        for parts in (cache.keys, cache.values, cache.key_codes, cache.value_codes, cache.key_scale, cache.value_scale):
            for part in (part for part in parts if part.numel()):
                for page in range(first, tokens // PAGE, first):
                    part[page : page + first] = part[:first]
        self._lengths = [tokens]

    def step(self) -> None:
        self._run(1)

    def _run(self, count: int) -> None:
        before, number = self._lengths, len(self._lengths)
        self._lengths = [length + count for length in before]
        most = self._pages // number
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("threads", type=int)
    parser.add_argument("head")
    parser.add_argument("--kv", default="none")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="the size of the cache")
    parser.add_argument("--kept", type=Path, help="where packed weights are kept from one start to the next")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    serve(Bitwright(args.checkpoint, args.head, kv=args.kv, tokens=args.tokens, kept=args.kept))
