"""llm-compressor: GPTQ, AWQ and round-to-nearest through ``oneshot``."""

from __future__ import annotations

import importlib.metadata

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.peers.driving import Cell, Refusal, block_linears

__all__ = ["METHODS", "quantize", "versions"]

METHODS = ("rtn", "gptq", "gptq-actorder", "awq", "awq-both", "awq+gptq")


def _recipe(cell: Cell) -> list[object]:
    weights = QuantizationArgs(
        num_bits=cell.bits,
        type="int",
        symmetric=cell.symmetric,
        strategy="channel" if cell.group is None else "group",
        group_size=cell.group,
    )
    groups = {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)}
    given = {"config_groups": groups, "ignore": ["lm_head"]}
    if cell.method == "rtn":
        return [QuantizationModifier(**given)]
    if cell.method == "awq":
        return [AWQModifier(), QuantizationModifier(**given)]
    if cell.method == "awq-both":
        return [AWQModifier(duo_scaling="both"), QuantizationModifier(**given)]
    gptq = GPTQModifier(actorder=None if cell.method == "gptq" else "static", **given)
    return [AWQModifier(duo_scaling="both"), gptq] if cell.method == "awq+gptq" else [gptq]


def quantize(model: nn.Module, cell: Cell) -> dict[str, Tensor]:
    """A recipe on the given windows; the weights are then read through the library's own quantization grid."""
    if cell.code != "int":
        raise Refusal(f"no {cell.code} weights of 16 levels with one float scale a group")
    if not torch.accelerator.is_available():
        Tensor.pin_memory = lambda tensor, *_: tensor  # AWQ pins its cache, which needs an accelerator
    batches = [{"input_ids": window.unsqueeze(0)} for window in cell.tokens]
    loader = DataLoader(batches, batch_size=None)
    reset_session()
    oneshot(
        model=model,
        dataset=loader,
        recipe=_recipe(cell),
        num_calibration_samples=len(batches),
        max_seq_length=cell.tokens.shape[1],
        processor=_Processor(),
    )
    for layer in block_linears(model).values():
        layer.weight.data = _on_grid(layer)
    return {name: value for name, value in model.state_dict().items() if _is_float_weight(name)}


def _on_grid(layer: nn.Module) -> Tensor:
    zero = getattr(layer, "weight_zero_point", None)
    return fake_quantize(
        x=layer.weight.data,
        scale=layer.weight_scale.data,
        zero_point=None if zero is None else zero.data,
        args=layer.quantization_scheme.weights,
    )


def _is_float_weight(name: str) -> bool:
    return name.rpartition(".")[2] in ("weight", "bias")


class _Processor:
    """Stands for the tokenizer, which is asked for but has nothing to do."""


def versions() -> str:
    return f"llmcompressor {importlib.metadata.version('llmcompressor')}"
