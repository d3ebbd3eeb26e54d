"""Everything that works on a block keeps to the device on which the block lies: seen on one that only pretends."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse
from bitwright.models.blocks import linears
from bitwright.quantization.algorithms import ALGORITHMS, make_method
from bitwright.quantization.capture import BlockCall
from bitwright.quantization.statistics import SiteStatistics
from bitwright.quantization.stream import BlockResult, BlockWork, Flow, quantize_block
from tests.kernels.gpu.pretending import PretendGpu, there

SIZES: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}


def test_the_device_refuses_to_meet_the_cpu() -> None:
    with PretendGpu():
        here, away = torch.ones(3), there(torch.ones(3))
        assert (away + 1).device == torch.zeros(2, device=away.device).device != here.device
        assert torch.equal((away * 2).cpu(), here * 2)
        with pytest.raises(RuntimeError, match="two devices"):
            _ = here + away


@pytest.mark.parametrize("algorithm", ["rtn", "gptq", "hqq"])
@pytest.mark.parametrize("scheme", ["w4g32", "w3g32-asym", "nf4g32", "nf4g32-dq", "w4g32-axis0", "w8", "fp8"])
def test_rounding_stays_on_the_device_and_gives_the_same(algorithm: str, scheme: str) -> None:
    weight, inputs, stage = torch.randn(24, 64), torch.randn(256, 64) * torch.rand(64), ALGORITHMS[algorithm].round
    found: list[QuantizedTensor] = []
    layer = parse(scheme).weight
    if algorithm == "hqq" and (layer.is_codebook or layer.axis == 0):
        pytest.skip("hqq has no such grids")
    with PretendGpu():
        for move in (torch.clone, there):
            statistics = SiteStatistics(64, with_gram=True)
            statistics.add(move(inputs))
            rounded: Any = stage.run(move(weight), statistics, layer, stage.options())
            found.append(getattr(rounded, "tensor", rounded))
        assert found[1].codes.device != found[0].codes.device
        assert torch.equal(found[1].codes.cpu(), found[0].codes)
        assert torch.equal(found[1].dequantize().cpu(), found[0].dequantize())


def rounded_block(algorithm: str, options: dict[str, Any], *, moved: bool) -> BlockResult:
    config = LlamaConfig(**SIZES, attn_implementation="eager")
    torch.manual_seed(1)
    block = LlamaDecoderLayer(config, 0).eval()
    inputs: list[Any] = [torch.randn(1, 16, 32) for _ in range(3)]
    places = torch.arange(16)[None]
    turns = LlamaRotaryEmbedding(config)(inputs[0], places)
    if moved:
        for module in block.modules():
            for name, parameter in list(module.named_parameters(recurse=False)):
                setattr(module, name, nn.Parameter(there(parameter), requires_grad=False))
        inputs, places, turns = [there(x) for x in inputs], there(places), tuple(there(each) for each in turns)
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    layers, method = linears(block, "layers.0"), make_method(algorithm, options)
    call = BlockCall((), {"position_ids": places, "position_embeddings": turns, "use_cache": False}, None)
    flow = Flow(tuple(inputs), ((call,) * 3,), (0, 1, 2)) if method.algorithm.calibrated else None
    work = BlockWork(name="layers.0", model=model, blocks=(block,), layers=layers, flow=flow, seed=0,
                     schemes=dict.fromkeys(layers, parse("w4g16")), methods=dict.fromkeys(layers, method))  # fmt: skip
    return quantize_block(work)


ALGORITHMS_THERE: list[tuple[str, dict[str, Any]]] = [
    ("rtn", {}), ("gptq", {}), ("gptq", {"true_sequential": True}), ("hqq", {}), ("autoround", {"iters": 2}),
    ("gptq+learned", {"code_steps": 2, "scale_steps": 2}), ("awq", {"grid": 4}), ("teq", {"steps": 3}),
]  # fmt: skip
MORE: list[tuple[str, dict[str, Any]]] = [
    ("awq", {"grid": 4, "folding": False}), ("awq+gptq", {"grid": 4}), ("teq+gptq", {"teq.steps": 2}), ("choice", {})
]  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "options"), [*ALGORITHMS_THERE, *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE)]
)
def test_a_whole_block_is_quantized_on_the_device(algorithm: str, options: dict[str, Any]) -> None:
    with PretendGpu():
        here, away = (rounded_block(algorithm, options, moved=moved) for moved in (False, True))
    assert away.output_error == here.output_error
    for name, tensor in here.tensors.items():
        assert away.tensors[name].codes.device != tensor.codes.device
        assert torch.equal(away.tensors[name].codes.cpu(), tensor.codes), name
    assert [row["relative_error"] for row in away.rows.values()] == [
        row["relative_error"] for row in here.rows.values()
    ]
