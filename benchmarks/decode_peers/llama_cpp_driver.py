"""Drives llama.cpp through its own C functions: GGUF THREADS."""

from __future__ import annotations

import ctypes
import random
import sys

import llama_cpp
from driving import CONTEXT, serve

__all__: list[str] = []

SEQUENCES, TOKENS = 16, 4096


class LlamaCpp:
    def __init__(self, path: str, threads: int) -> None:
        silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self._kept = silence
        llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = TOKENS, 1024, 512, SEQUENCES
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = True
        self._context = llama_cpp.llama_init_from_model(self._model, settings)
        self._batch = llama_cpp.llama_batch_init(1024, 0, 1)
        self._memory = llama_cpp.llama_get_memory(self._context)

    def prefill(self, tokens: int) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)
        self._decode([(position, 0, position == tokens - 1) for position in range(tokens)])

    def start(self, sequences: int) -> None:
        llama_cpp.llama_memory_clear(self._memory, True)
        self._sequences, self._length = sequences, CONTEXT
        for sequence in range(sequences):
            self._decode([(position, sequence, position == CONTEXT - 1) for position in range(CONTEXT)])

    def step(self) -> None:
        self._decode([(self._length, sequence, True) for sequence in range(self._sequences)])
        self._length += 1

    def _decode(self, rows: list[tuple[int, int, bool]]) -> None:
        batch = self._batch
        batch.n_tokens = len(rows)
        for row, (position, sequence, wants_logits) in enumerate(rows):
            batch.token[row], batch.pos[row] = random.randrange(3, 1000), position
            batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, sequence, wants_logits
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        llama_cpp.llama_synchronize(self._context)


if __name__ == "__main__":
    serve(LlamaCpp(sys.argv[1], int(sys.argv[2])))
