"""Writes a checkpoint of benchmarks.shapes as ONNX Runtime GenAI has it: CHECKPOINT OUT int4.

Its model builder rounds to symmetric groups of 32, with 8-bit activations in the products; of 8-bit weights for CPUs it
knows none. Runs in the environment of onnxruntime-genai.
"""

from __future__ import annotations

import runpy
import sys
import tempfile
from pathlib import Path

import transformers
from onnxruntime_genai.models.builders import base

__all__ = ["write"]


class WordlessTokenizer:
    """All that the builder asks a tokenizer for."""

    def get_vocab(self) -> dict[str, int]:
        return {}

    def save_pretrained(self, directory: str) -> None:
        """Nothing to save."""


def write(source: Path, target: Path, kind: str) -> None:
    if kind != "int4":
        raise SystemExit("the model builder has no 8-bit weights for CPUs")
    # Random weights have no tokenizer, whose special tokens would be looked up, and which would be copied.
    transformers.AutoTokenizer.from_pretrained = lambda *_, **__: WordlessTokenizer()
    base.Model.save_processing = lambda *_, **__: None
    options = ["int4_block_size=32", "int4_is_symmetric=true", "int4_accuracy_level=4"]
    with tempfile.TemporaryDirectory() as cache:
        sys.argv = ["builder", "-i", str(source), "-o", str(target), "-p", "int4", "-e", "cpu", "-c", cache]
        sys.argv += ["--extra_options", *options]
        runpy.run_module("onnxruntime_genai.models.builder", run_name="__main__")


if __name__ == "__main__":
    write(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
