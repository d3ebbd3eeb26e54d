"""Logits of llama.cpp with caches of several kinds: CHECKPOINT WINDOWS OUT CACHE...

CHECKPOINT is a directory of a Qwen2 model in bf16; its weights are written as GGUF in float32, so that the cache alone
is rounded. WINDOWS is int32 ``[windows, tokens]`` (.npy). Of each CACHE (f32, f16, q8_0, q4_0, for keys and values)
the logits of every position, float32 ``[windows, tokens, vocabulary]``, go to OUT-CACHE.npy. Runs in the environment
of llama-cpp-python, which has its gguf, too.
"""

from __future__ import annotations

import ctypes
import sys
import tempfile
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from gguf_writer import write
from numpy.typing import NDArray

__all__: list[str] = []

KINDS = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}  # ggml's numbers of these types
Array = NDArray[np.float32]


def read_logits(model: Any, windows: NDArray[np.int32], kind: int) -> Array:
    """Each window from an empty cache, whole; one thread."""
    settings = llama_cpp.llama_context_default_params()
    length = windows.shape[1]
    settings.n_ctx = settings.n_batch = settings.n_ubatch = length
    settings.n_seq_max = settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = kind
    settings.flash_attn_type = 1  # quantized values need it
    context = llama_cpp.llama_init_from_model(model, settings)
    if not context:
        raise RuntimeError("llama.cpp makes no such context")
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    batch, found = llama_cpp.llama_batch_init(length, 0, 1), []
    for window in windows:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
        batch.n_tokens = length
        for row, token in enumerate(window):
            batch.token[row], batch.pos[row] = int(token), row
            batch.n_seq_id[row], batch.seq_id[row][0], batch.logits[row] = 1, 0, True
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        pointer = ctypes.cast(llama_cpp.llama_get_logits(context), ctypes.POINTER(ctypes.c_float))
        found.append(np.ctypeslib.as_array(pointer, (length, vocabulary)).copy())
    llama_cpp.llama_free(context)
    return np.stack(found)


def main(checkpoint: str, windows: str, out: str, kinds: list[str]) -> None:
    silence = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silence, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        write(Path(checkpoint), path, "f32")
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        for kind in kinds:
            np.save(f"{out}-{kind}.npy", read_logits(model, np.load(windows), KINDS[kind]))
    print(llama_cpp.__version__)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
