"""Drives transformers in bfloat16: CHECKPOINT THREADS."""

from __future__ import annotations

import sys

import torch
from driving import CONTEXT, serve
from transformers import AutoModelForCausalLM, DynamicCache

__all__: list[str] = []


class Transformers:
    def __init__(self, directory: str) -> None:
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def prefill(self, tokens: int) -> None:
        self._begin(1, tokens)

    @torch.inference_mode()
    def start(self, sequences: int) -> None:
        self._begin(sequences, CONTEXT)

    def _begin(self, sequences: int, tokens: int) -> None:
        self._cache, self._batch = DynamicCache(config=self._model.config), sequences
        ids = torch.randint(3, 1000, (sequences, tokens))
        self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)

    def fill(self, tokens: int) -> None:
        raise NotImplementedError("long contexts are compared with llama.cpp alone")

    @torch.inference_mode()
    def step(self) -> None:
        ids = torch.randint(3, 1000, (self._batch, 1))
        self._model(input_ids=ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1)


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[2]))
    serve(Transformers(sys.argv[1]))
