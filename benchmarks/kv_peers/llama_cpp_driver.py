"""Logits of llama.cpp with caches of several kinds: CHECKPOINT WINDOWS OUT CACHE...

CHECKPOINT is a directory of a Qwen2 model in bf16; its weights are written as GGUF in float32, so that the cache alone
is rounded. WINDOWS is int32 ``[windows, tokens]`` (.npy). Of each CACHE (f32, f16, q8_0, q4_0, for keys and values)
the logits of every position, float32 ``[windows, tokens, vocabulary]``, go to OUT-CACHE.npy. Runs in the environment
of llama-cpp-python, which has its gguf, too.
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
from numpy.typing import NDArray

__all__: list[str] = []

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
ENDS = {"embed_tokens": "token_embd", "norm": "output_norm"}
KINDS = {"f32": 0, "f16": 1, "q4_0": 2, "q8_0": 8}  # ggml's numbers of these types
Array = NDArray[np.float32]


def write_gguf(directory: Path, target: Path) -> None:
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(str(target), config["model_type"])
    theta = config.get("rope_theta") or config["rope_parameters"]["rope_theta"]
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(theta)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, tensor in read_tensors(directory):
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_tensors(directory: Path) -> Iterator[tuple[str, Array]]:
    for path in sorted(directory.glob("model*.safetensors")):
        data = np.fromfile(path, dtype=np.uint8)
        start = 8 + int(data[:8].view(np.uint64)[0])
        for key, fields in json.loads(bytes(data[8:start])).items():
            if key == "__metadata__":
                continue
            assert fields["dtype"] == "BF16", f"{key} is {fields['dtype']}"
            begin, end = (start + offset for offset in fields["data_offsets"])
            words = data[begin:end].view(np.uint16).astype(np.uint32) << 16
            yield gguf_name(key), words.view(np.float32).reshape(fields["shape"])


def gguf_name(key: str) -> str:
    layer, _, leaf = key.removeprefix("model.").rpartition(".")
    if layer in ENDS:
        return f"{ENDS[layer]}.{leaf}"
    _, block, rest = layer.split(".", 2)
    return f"blk.{block}.{NAMES[rest]}.{leaf}"


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
        write_gguf(Path(checkpoint), path)
        model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        for kind in kinds:
            np.save(f"{out}-{kind}.npy", read_logits(model, np.load(windows), KINDS[kind]))
    print(llama_cpp.__version__)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3], sys.argv[4:])
