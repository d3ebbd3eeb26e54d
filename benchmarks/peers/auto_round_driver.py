"""AutoRound: rounding and clipping learned block by block with signed gradients."""

from __future__ import annotations

import importlib.metadata

from auto_round import AutoRound
from torch import Tensor, nn

from benchmarks.peers.driving import Cell, Refusal

__all__ = ["METHODS", "quantize", "versions"]

METHODS = {
    "autoround": {"iters": 200},
    "autoround-3": {"iters": 3},  # this and the next: to time an iteration
    "autoround-9": {"iters": 9},
    "rtn": {"iters": 0, "disable_opt_rtn": True},
}


def quantize(model: nn.Module, cell: Cell) -> dict[str, Tensor]:
    """The library's defaults (200 iterations of 8 samples) on the given windows."""
    if cell.code != "int":
        raise Refusal(f"no {cell.code} weights without quantized activations")
    samples, seqlen = cell.tokens.shape
    rounding = AutoRound(
        model,
        tokenizer=_Tokenizer(),
        scheme="W4A16",
        bits=cell.bits,
        group_size=cell.group or -1,
        sym=cell.symmetric,
        dataset=[{"input_ids": window.unsqueeze(0)} for window in cell.tokens],
        seqlen=seqlen,
        nsamples=samples,
        batch_size=8,
        device_map="cpu",
        enable_torch_compile=False,
        seed=0,
        **METHODS[cell.method],
    )
    quantized, _ = rounding.quantize()
    return quantized.state_dict()


class _Tokenizer:
    """Stands for the tokenizer, which is asked for but has nothing to do."""


def versions() -> str:
    return f"auto-round {importlib.metadata.version('auto-round')}"
