"""Drives ONNX Runtime GenAI: MODEL THREADS. The model is what ``onnx_writer.py`` made."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import onnxruntime_genai
from driving import CONTEXT, serve

__all__: list[str] = []

TOKENS = 1024


class Genai:
    def __init__(self, model: Path, threads: int) -> None:
        settings = json.loads((model / "genai_config.json").read_text())
        settings["model"]["decoder"]["session_options"]["intra_op_num_threads"] = threads
        with tempfile.TemporaryDirectory() as folder:  # the number of threads is read from a file beside the model
            for file in model.iterdir():
                (Path(folder) / file.name).symlink_to(file.resolve())
            (Path(folder) / "genai_config.json").unlink()
            (Path(folder) / "genai_config.json").write_text(json.dumps(settings))
            self._model = onnxruntime_genai.Model(folder)

    def prefill(self, tokens: int) -> None:
        self._begin(1, tokens)

    def start(self, sequences: int) -> None:
        self._begin(sequences, CONTEXT)

    def fill(self, tokens: int) -> None:
        raise NotImplementedError("long contexts are compared with llama.cpp alone")

    def _begin(self, sequences: int, tokens: int) -> None:
        settings = onnxruntime_genai.GeneratorParams(self._model)
        settings.set_search_options(batch_size=sequences, max_length=TOKENS, min_length=TOKENS)
        self._generator, self._sequences = onnxruntime_genai.Generator(self._model, settings), sequences
        self._run(tokens)

    def step(self) -> None:
        if self._sequences == 1:
            self._run(1)
        else:  # of several sequences only the first tokens can be given; the first of these calls computes nothing yet
            self._generator.generate_next_token()

    def _run(self, count: int) -> None:
        """The logits of the last token are there when this returns."""
        self._generator.append_tokens(np.random.randint(3, 1000, (self._sequences, count), dtype=np.int32))


if __name__ == "__main__":
    serve(Genai(Path(sys.argv[1]), int(sys.argv[2])))
