"""Writes a bf16 checkpoint of a Llama or Qwen2 as GGUF: CHECKPOINT OUT f32|q4_0|q8_0, rounded as llama.cpp rounds.

The head is the embedding, in q8_0 where weights are rounded. Runs in the environment of llama-cpp.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

__all__ = ["write"]

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
ENDS = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}


def write(directory: Path, target: Path, kind: str) -> None:
    config = json.loads((directory / "config.json").read_text())
    writer = gguf.GGUFWriter(str(target), config["model_type"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])
    writer.add_rope_dimension_count(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    kinds = {"q4_0": gguf.GGMLQuantizationType.Q4_0, "q8_0": gguf.GGMLQuantizationType.Q8_0}
    for key, tensor in _read(directory):
        if tensor.ndim == 1 or kind == "f32":
            writer.add_tensor(_name(key), tensor)
        else:
            wanted = kinds["q8_0" if key == "model.embed_tokens.weight" else kind]
            writer.add_tensor(_name(key), gguf.quantize(tensor, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _read(directory: Path) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Each bfloat16 tensor, as float32."""
    for path in sorted(directory.glob("model*.safetensors")):
        data = np.memmap(path, dtype=np.uint8, mode="r")
        start = 8 + int(data[:8].view(np.uint64)[0])
        for key, fields in json.loads(bytes(data[8:start])).items():
            if key != "__metadata__":
                assert fields["dtype"] == "BF16", f"{key} is {fields['dtype']}"
                begin, end = (start + offset for offset in fields["data_offsets"])
                words = data[begin:end].view(np.uint16).astype(np.uint32) << 16
                yield key, words.view(np.float32).reshape(fields["shape"])


def _name(key: str) -> str:
    if key in ENDS:
        return ENDS[key]
    _, _, block, rest = key.split(".", 3)
    layer, _, leaf = rest.rpartition(".")
    return f"blk.{block}.{NAMES[layer]}.{leaf}"


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
