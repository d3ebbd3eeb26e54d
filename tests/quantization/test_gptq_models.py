"""GPTQ through the block stream: on files and in memory, on odd architectures, on mixtures of experts."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse
from bitwright.models.blocks import linears
from bitwright.models.hf import load_tokenizer
from bitwright.models.loading import load
from bitwright.models.quantized import QuantizedLinear
from bitwright.quantization.algorithms import make_method
from bitwright.quantization.api import quantize
from bitwright.quantization.calibration import cut_windows, tokenize
from bitwright.quantization.capture import BlockCall
from bitwright.quantization.gptq import GptqOptions, round_by_error_feedback
from bitwright.quantization.session import convert, prepare
from bitwright.quantization.statistics import SiteStatistics
from bitwright.quantization.stream import BlockResult, BlockWork, Flow, quantize_block
from tests.quantization.tiny import TEXT, Plain, save_model

SAMPLES, SEQLEN = 6, 16


def windows(model: Path) -> Tensor:
    ids = tokenize(load_tokenizer(model), TEXT)
    return cut_windows(ids, samples=SAMPLES, seqlen=SEQLEN, seed=0, source="text").windows


def run(place: Path, output: str = "out", **changes: object) -> Path:
    (place / "text").write_text(TEXT)
    arguments = {"calibration": place / "text", "samples": SAMPLES, "seqlen": SEQLEN, "scheme": "w4g32"}
    quantize(place / "model", place / output, algorithm="gptq", format="native", **(arguments | changes))  # type: ignore[arg-type]
    return place / output


def tensors(model: nn.Module) -> dict[str, QuantizedTensor]:
    return {name: layer.unpack() for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}


def work_on(block: nn.Module, inputs: list[Tensor], scheme: str = "w3g8", **options: object) -> BlockResult:
    """Quantize one block, as the stream does."""
    model = nn.Module()
    model.layers = nn.ModuleList([block])
    layers = linears(block, "layers.0")
    method = make_method("gptq", options)
    flow = Flow(tuple(inputs), ((BlockCall((), {}, None),) * len(inputs),), tuple(range(len(inputs))))
    return quantize_block(
        BlockWork(
            name="layers.0", model=model, blocks=(block,), layers=layers, schemes=dict.fromkeys(layers, parse(scheme)),
            methods=dict.fromkeys(layers, method), flow=flow, seed=0,
        )
    )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_streamed_saved_and_loaded_is_what_is_made_in_memory(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    save_model(tmp_path / "model", family, dtype=dtype)
    loaded = load(run(tmp_path))
    prepared = prepare(load(tmp_path / "model"), scheme="w4g32", algorithm="gptq")
    ids = windows(tmp_path / "model")
    for window in ids:
        prepared(input_ids=window[None], use_cache=False)
    model = convert(prepared)
    streamed = tensors(loaded)
    assert len(streamed) == (14 if family == "llama" else 8)
    for name, tensor in tensors(model).items():
        assert torch.equal(tensor.codes, streamed[name].codes)
        assert torch.equal(tensor.dequantize(), streamed[name].dequantize())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, loaded(ids).logits)


def test_batches_of_calibration_data_make_no_difference(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    ids = windows(tmp_path / "model")
    made = []
    for size in (1, SAMPLES):
        prepared = prepare(load(tmp_path / "model"), scheme="w4g32", algorithm="gptq")
        for start in range(0, SAMPLES, size):
            prepared(input_ids=ids[start : start + size], use_cache=False)
        made.append(tensors(convert(prepared)))
    same = [float((made[0][name].codes == made[1][name].codes).float().mean()) for name in made[0]]
    assert min(same) > 0.99 and sum(same) / len(same) > 0.999  # products of other shapes add up in another order


def test_the_output_head_by_its_own_rule_leaves_the_embedding_alone(tmp_path: Path) -> None:
    source = save_model(tmp_path / "model", "qwen2")
    model = load(run(tmp_path, overrides=["lm_head=w8g32"], scheme="w8g32"))
    assert isinstance(model.lm_head, QuantizedLinear)
    assert torch.equal(model.get_input_embeddings().weight, source.get_input_embeddings().weight)
    ids = windows(tmp_path / "model")
    with torch.no_grad():
        logits = torch.stack([source(ids).logits.flatten(), model(ids).logits.flatten()])
    assert float(torch.corrcoef(logits)[0, 1]) > 0.99


def test_a_plain_module_is_quantized_and_one_without_blocks_is_refused() -> None:
    source = Plain()
    prepared = prepare(source, scheme="w3g32", algorithm="gptq")
    inputs = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    prepared(inputs)
    model = convert(prepared)
    nearest = convert(prepare(source, scheme="w3g32", algorithm="rtn"))
    with torch.no_grad():
        errors = [float((each(inputs) - source(inputs)).square().sum()) for each in (model, nearest)]
    assert errors[0] < errors[1]
    with pytest.raises(BitwrightError, match="no ModuleList"):
        prepare(nn.Sequential(nn.Linear(8, 8)), scheme="w3g8", algorithm="gptq")


def test_nothing_is_touched_without_calibration(tmp_path: Path) -> None:
    source = Plain()
    before = copy.deepcopy(source.state_dict())
    prepared = prepare(source, scheme="w3g32", algorithm="gptq", inplace=True)
    with pytest.raises(BitwrightError) as failure:
        convert(prepared)
    assert failure.value.code == "BW401"
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    save_model(tmp_path / "model", "llama")
    (tmp_path / "text").write_text("a")
    with pytest.raises(BitwrightError) as failure:
        quantize(tmp_path / "model", tmp_path / "out", algorithm="gptq", scheme="w4g32", calibration=tmp_path / "text")
    assert failure.value.code == "BW401" and not (tmp_path / "out" / "model.safetensors.index.json").exists()


class Experts(nn.Module):
    """Each token goes to one of three experts, by its first number; the third is never chosen by small ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))

    def forward(self, hidden: Tensor) -> Tensor:
        result = hidden.clone()
        chosen = (hidden[..., 0] > 0).long() + (hidden[..., 0] > 100).long()
        for number, expert in enumerate(self.experts):
            if (chosen == number).any():
                result[chosen == number] += expert(hidden[chosen == number])
        return result


def test_every_expert_has_its_own_hessian_and_one_without_tokens_is_rounded_to_nearest() -> None:
    block = Experts()
    weights = [expert.weight.detach().clone() for expert in block.experts]
    inputs = [torch.randn(1, 50, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    result = work_on(block, inputs)
    tokens = torch.cat([hidden[0] for hidden in inputs])
    for number, mine in enumerate((tokens[tokens[:, 0] <= 0], tokens[tokens[:, 0] > 0])):
        site = SiteStatistics(16, with_gram=True)
        site.add(mine)
        expected = round_by_error_feedback(weights[number], site, parse("w3g8").weight, GptqOptions()).tensor
        assert torch.equal(result.tensors[f"layers.0.experts.{number}"].codes, expected.codes)
    nearest = QuantizedTensor.quantize(weights[2], parse("w3g8").weight)
    assert torch.equal(result.tensors["layers.0.experts.2"].codes, nearest.codes)
    assert result.rows["layers.0.experts.2"]["rounded_by"] == "rtn"
    assert "rounded_by" not in result.rows["layers.0.experts.0"]


@pytest.mark.parametrize("true_sequential", [False, True])
def test_true_sequential_sites_see_rounded_predecessors(true_sequential: bool) -> None:
    block = Plain(16).blocks[0]
    up, down, norm = block.up.weight.detach().clone(), block.down.weight.detach().clone(), copy.deepcopy(block.norm)
    bias = block.up.bias.detach().clone()
    inputs = [torch.randn(1, 30, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    result = work_on(block, inputs, true_sequential=true_sequential)

    def expect(weight: Tensor, tokens: Tensor) -> QuantizedTensor:
        site = SiteStatistics(weight.shape[1], with_gram=True)
        site.add(tokens)
        return round_by_error_feedback(weight, site, parse("w3g8").weight, GptqOptions()).tensor

    with torch.no_grad():
        hidden = norm(torch.cat([sample[0] for sample in inputs]))
        first = expect(up, hidden)
        assert torch.equal(result.tensors["layers.0.up"].codes, first.codes)
        matrix = first.dequantize() if true_sequential else up
        second = expect(down, torch.relu(nn.functional.linear(hidden, matrix, bias)))
    assert torch.equal(result.tensors["layers.0.down"].codes, second.codes)
