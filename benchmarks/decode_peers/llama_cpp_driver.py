"""Drives llama.cpp through its own C functions: GGUF THREADS [TYPE OF THE CACHE, TOKENS OF THE CACHE]."""

from __future__ import annotations

import ctypes
import random
import struct
import sys

import llama_cpp
from driving import CONTEXT, FILLED, serve

__all__: list[str] = []

SEQUENCES, TOKENS = 16, 4096
CACHES = {"f16": llama_cpp.GGML_TYPE_F16, "q8_0": llama_cpp.GGML_TYPE_Q8_0, "q4_0": llama_cpp.GGML_TYPE_Q4_0}


class LlamaCpp:
    def __init__(self, path: str, threads: int, kv: str | None = None, tokens: int = TOKENS) -> None:
        silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
        self._kept = silence
        llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(path.encode(), llama_cpp.llama_model_default_params())
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx, settings.n_batch, settings.n_ubatch, settings.n_seq_max = tokens, 1024, 512, SEQUENCES
        settings.n_threads = settings.n_threads_batch = threads
        settings.kv_unified = True
        if kv is not None:
            settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
            settings.type_k = settings.type_v = CACHES[kv]
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

    def fill(self, tokens: int) -> None:
        self.prefill(FILLED)
        state = self._state()
        longer = _repeat(state, tokens // FILLED)
        llama_cpp.llama_memory_clear(self._memory, True)
        held = (ctypes.c_uint8 * len(longer)).from_buffer_copy(longer)
        if llama_cpp.llama_state_seq_set_data(self._context, held, len(longer), 0) != len(longer):
            raise RuntimeError("the state of a long context is not taken")
        self._sequences, self._length = 1, tokens

    def _state(self) -> bytes:
        size = llama_cpp.llama_state_seq_get_size(self._context, 0)
        held = (ctypes.c_uint8 * size)()
        llama_cpp.llama_state_seq_get_data(self._context, held, size, 0)
        return bytes(held)

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


def _repeat(state: bytes, times: int) -> bytes:
    """A sequence's state with ``times`` as many cells, at positions one after the other.

    A mark and a number; streams; of each the number of cells, each cell's position and sequences; whether values are
    transposed, layers; of each layer type, bytes of a row and rows, of keys and then of values.
    """
    streams, cells = struct.unpack_from("<II", state, 8)
    if streams != 1 or cells != FILLED:
        raise RuntimeError("a state of another layout")
    place, width = 16, 8 + 4 * struct.unpack_from("<I", state, 20)[0]
    marks = state[place + 4 : place + width]
    parts = [state[:12], struct.pack("<I", cells * times)]
    parts += [struct.pack("<i", position) + marks for position in range(cells * times)]
    place += width * cells
    transposed, layers = struct.unpack_from("<II", state, place)
    parts.append(state[place : place + 8])
    place += 8
    for _ in range(2 * layers):
        size = struct.unpack_from("<Q", state, place + 4)[0]
        parts.append(state[place : place + 12])
        parts.append(state[place + 12 : place + 12 + size * cells] * times)
        place += 12 + size * cells
    if transposed or place != len(state):
        raise RuntimeError("a state of another layout")
    return b"".join(parts)


if __name__ == "__main__":
    serve(LlamaCpp(sys.argv[1], int(sys.argv[2]), *sys.argv[3:4], *map(int, sys.argv[4:5])))
