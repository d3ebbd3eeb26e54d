"""Drives OpenVINO with its hint for latency: IR THREADS. The IR is what ``openvino_writer.py`` made."""

from __future__ import annotations

import sys

import numpy as np
import openvino
from driving import CONTEXT, serve

__all__: list[str] = []


class OpenVino:
    def __init__(self, path: str, threads: int) -> None:
        settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads}
        self._request = (
            openvino.Core().compile_model(path + "/openvino_model.xml", "CPU", settings).create_infer_request()
        )

    def prefill(self, tokens: int) -> None:
        self._begin(1, tokens)

    def start(self, sequences: int) -> None:
        self._begin(sequences, CONTEXT)

    def _begin(self, sequences: int, tokens: int) -> None:
        self._request.reset_state()
        self._sequences, self._length = sequences, 0
        self._run(tokens)

    def fill(self, tokens: int) -> None:
        raise NotImplementedError("long contexts are compared with llama.cpp alone")

    def step(self) -> None:
        self._run(1)

    def _run(self, count: int) -> None:
        shape = (self._sequences, count)
        positions = np.arange(self._length, self._length + count)
        self._length += count
        self._request.infer({
            "input_ids": np.random.randint(3, 1000, shape),
            "attention_mask": np.ones((self._sequences, self._length), dtype=np.int64),
            "position_ids": np.broadcast_to(positions, shape).copy(),
            "beam_idx": np.arange(self._sequences, dtype=np.int32),
        })  # fmt: skip
        self._request.get_output_tensor(0).data[0, -1, 0]


if __name__ == "__main__":
    serve(OpenVino(sys.argv[1], int(sys.argv[2])))
