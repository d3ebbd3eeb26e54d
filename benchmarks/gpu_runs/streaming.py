"""A checkpoint streamed to the GPU block by block: what a block takes among others, and what copying it takes alone."""

from __future__ import annotations

import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from benchmarks.gpu_runs.shapes import MODELS, TINY
from benchmarks.gpu_runs.timing import Bench, Section
from bitwright.quantization.api import quantize
from bitwright.quantization.device_stream import CudaLane
from bitwright.quantization.events import Event

__all__ = ["measure_streaming"]

BLOCKS, SAMPLES, LENGTH = 4, 16, 2048
LETTERS = "abcdefghijklmnopqrstuvwxyz .,\n"


def measure_streaming(bench: Bench) -> Section:
    """GPTQ of a few blocks from files to files."""
    section = bench.begin("a stream of blocks of llama-3-8b, 32,768 tokens, from files to files",
                          ("algorithm", "block", "seconds", "output error", "memory of the GPU"))  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "float"
        _make_checkpoint(bench, source)
        for algorithm in bench.within(section, ("gptq", "rtn")):
            with bench.attempt(section, algorithm):
                _stream(bench, section, source, Path(folder) / algorithm, algorithm)
        if not bench.is_dry:
            _copy(section)
    section.notes.append("a block's seconds hold its reading, copying, rounding, and the writing of the one before it")
    section.notes.append("evidence for a whole model: blocks after the first take the same time, whatever their number")
    return section


def _stream(bench: Bench, section: Section, source: Path, output: Path, algorithm: str) -> None:
    def listen(event: Event) -> None:
        if event.kind == "plan" and "device_bytes" in event.data:
            section.notes.append(f"{algorithm}: planned {event.data['device_bytes'] / 1e9:.2f} GB of the GPU at most")
        if event.kind != "unit" or event.data["unit"] == "outer":
            return
        error, seconds = event.data["output_error"], event.data["seconds"]
        peak = "" if bench.is_dry else f"{torch.cuda.max_memory_allocated() / 1e9:.2f} GB"
        section.add(algorithm, event.data["unit"], f"{seconds:.2f}", "" if error is None else f"{error:.1e}", peak)

    fields: dict[str, Any] = {"samples": bench.size(SAMPLES, 2), "seqlen": bench.size(LENGTH, 16)}
    if algorithm == "gptq":
        fields["calibration"] = source / "text.txt"
    if not bench.is_dry:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    quantize(source, output, scheme=f"w4g{bench.size(128, 32)}", algorithm=algorithm, on_event=listen,
             device=str(bench.device), **fields)  # fmt: skip
    section.notes.append(f"{algorithm}: {time.perf_counter() - started:.1f} s in all")


def _copy(section: Section) -> None:
    """The copy of one block from memory, pinning included, and the part of it that the second stream does."""
    shape = MODELS["llama-3-8b"]
    tensors = {name: torch.empty(size, dtype=torch.bfloat16) for name, size in shape.matrices.items()}
    nbytes, lane = sum(tensor.nbytes for tensor in tensors.values()), CudaLane(torch.device("cuda"))
    for _ in range(2):
        started = time.perf_counter()
        copies = lane.begin(tensors)
        begun = time.perf_counter()
        lane.finish(copies)
        torch.cuda.synchronize()
        ended = time.perf_counter()
    rate = nbytes / max(1e-9, ended - begun) / 1e9
    section.notes.append(f"{nbytes / 1e6:.0f} MB a block: pinned in {begun - started:.3f} s by its own thread, then "
                         f"at least {rate:.1f} GB/s beside the work")  # fmt: skip


def _make_checkpoint(bench: Bench, directory: Path) -> None:
    """A model of a few blocks, few letters, and a text of them."""
    shape = TINY if bench.is_dry else MODELS["llama-3-8b"]
    config = LlamaConfig(
        hidden_size=shape.hidden, intermediate_size=shape.intermediate, num_hidden_layers=bench.size(BLOCKS, 2),
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads, vocab_size=len(LETTERS) + 1,
        max_position_embeddings=8192, tie_word_embeddings=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.ones_(parameter) if "norm" in name else torch.nn.init.normal_(parameter, std=0.02)
    model.save_pretrained(directory)
    characters = Tokenizer(models.WordLevel({letter: n for n, letter in enumerate(LETTERS)} | {"?": len(LETTERS)}, "?"))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    characters.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "?"}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    draw = random.Random(0)
    count = bench.size((SAMPLES + 1) * LENGTH, 200)
    (directory / "text.txt").write_text("".join(draw.choice(LETTERS) for _ in range(count)))
