"""Loading: the same numbers as in the files, packed numbers packed, and every mismatch named."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse
from bitwright.formats import native
from bitwright.models import loading
from bitwright.models.blocks import is_linear
from bitwright.models.loading import load, load_with_tokenizer
from bitwright.models.quantized import QuantizedLinear
from tests.models.checkpoints import (
    ARCHITECTURES,
    VOCABULARY,
    byte_tokenizer,
    dequantized,
    save_float,
    save_quantized,
)

TOKENS = torch.arange(40).view(2, 20) * 7 % VOCABULARY
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(input_ids=TOKENS).logits
    return output


def block_linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_linear(module) and name.count(".") > 2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_float_checkpoint_gives_the_same_logits(architecture: str, dtype: torch.dtype, tmp_path: Path) -> None:
    directory = save_float(ARCHITECTURES[architecture](), tmp_path, dtype)
    loaded = load(directory)
    assert loaded.dtype == dtype
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(directory)))
    assert not any(parameter.is_meta or parameter.requires_grad for parameter in loaded.parameters())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("format", ["native", "compressed-tensors"])
def test_a_quantized_checkpoint_runs_from_codes(
    architecture: str, dtype: torch.dtype, format: str, tmp_path: Path
) -> None:
    """W37, W40, W41: the file is enough, the output has the model's dtype, Conv1D included."""
    model = ARCHITECTURES[architecture]().to(dtype).eval()
    names = block_linears(model)
    assert names
    tensors = save_quantized(model, tmp_path, {name: parse("w4g8") for name in names}, format=format)
    loaded = load(tmp_path)
    layers = {name: module for name, module in loaded.named_modules() if isinstance(module, QuantizedLinear)}
    assert sorted(layers) == sorted(names)
    assert all(torch.equal(layers[name].unpack().codes, tensors[name].codes) for name in names)
    output = logits(loaded)
    assert output.dtype == dtype
    expected = logits(dequantized(model, tensors))
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["w1g8", "w3g7-asym", "w8", "nf4g16-dq", "fp8", "a16w4", "w4g8-axis0", "w8a8", "a8w4"])
def test_every_scheme_loads(name: str, tmp_path: Path) -> None:
    model = ARCHITECTURES["qwen2"]().eval()
    scheme = parse(name)
    tensors = save_quantized(model, tmp_path, dict.fromkeys(block_linears(model), scheme))
    output, expected = logits(load(tmp_path)), logits(dequantized(model, tensors))
    assert torch.isfinite(output).all()
    error = (output - expected).abs().max() / expected.abs().max()
    assert error <= (0.05 if scheme.activation else 1e-4)


def reachable(module: nn.Module) -> Iterator[Tensor]:
    """Every tensor that hangs on the module in any way, but for classes, functions and modules of code."""
    seen: set[int] = set()
    queue: list[Any] = [module]
    while queue:
        item = queue.pop()
        if id(item) in seen or isinstance(item, type) or (callable(item) and not isinstance(item, nn.Module)):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        queue += gc.get_referents(item)


def live_tensors() -> list[Tensor]:
    return [item for item in gc.get_objects() if issubclass(type(item), Tensor)]


@pytest.mark.parametrize(
    ("name", "grad"),
    [("w4g32", False), ("w4g32", True), ("nf4g32-dq", False), ("w8a8", True), ("w3g32-asym-axis0", False)],
)
def test_no_dense_copy_is_kept(name: str, grad: bool, tmp_path: Path) -> None:
    """W38: after ten forwards, resident weight bytes are at most the packed ones and a tenth."""
    model = ARCHITECTURES["llama"]().eval()
    tensors = save_quantized(model, tmp_path, dict.fromkeys(block_linears(model), parse(name)))
    stored = {layer: tensor.stored_bits() / 8 for layer, tensor in tensors.items()}
    shapes = {tensor.shape for tensor in tensors.values()} | {tensor.shape[::-1] for tensor in tensors.values()}
    del model, tensors
    gc.collect()
    earlier = live_tensors()  # of other tests
    known = {id(tensor) for tensor in earlier}
    loaded = load(tmp_path)
    with torch.set_grad_enabled(grad):
        for _ in range(10):
            output = loaded(input_ids=TOKENS).logits
    resident = 0
    for layer in stored:
        storages = {tensor.untyped_storage() for tensor in reachable(loaded.get_submodule(layer))}
        unique = {storage.data_ptr(): storage.nbytes() for storage in storages}
        resident += sum(unique.values())
    assert resident <= 1.1 * sum(stored.values())
    known |= {id(parameter) for parameter in loaded.parameters()}
    dense = [tensor for tensor in live_tensors() if id(tensor) not in known and tensor.is_floating_point()]
    assert not [tuple(tensor.shape) for tensor in dense if tuple(tensor.shape) in shapes]
    assert torch.isfinite(output).all()


def test_one_layer_at_a_time_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = ARCHITECTURES["llama"]()
    save_quantized(model, tmp_path, dict.fromkeys(block_linears(model), parse("w4g32")))
    codes: list[weakref.ref[Tensor]] = []
    decode = native._decode

    def watched(*arguments: Any) -> QuantizedTensor:
        assert not [alive for alive in codes if alive() is not None]
        tensor = decode(*arguments)
        codes.append(weakref.ref(tensor.codes))
        return tensor

    monkeypatch.setattr(native, "_decode", watched)
    load(tmp_path)
    assert len(codes) == 14


def without_prefix(name: str) -> str:
    return name.removeprefix("model.").removeprefix("transformer.")


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "gpt2", "opt"])
def test_names_may_lack_the_prefix_of_the_base_model(architecture: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[architecture]().eval()
    expected = logits(model)
    plain = save_float(model, tmp_path / "float")
    state = {without_prefix(name): tensor for name, tensor in load_file(plain / "model.safetensors").items()}
    save_file(state, plain / "model.safetensors")
    assert torch.equal(logits(load(plain)), expected)
    tensors = save_quantized(
        model, tmp_path / "quantized", dict.fromkeys(block_linears(model), parse("w8")), rename=without_prefix
    )
    loaded = logits(load(tmp_path / "quantized"))
    torch.testing.assert_close(loaded, logits(dequantized(model, tensors)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "llama-untied"])
def test_a_quantized_head_leaves_the_embedding_alone(architecture: str, tmp_path: Path) -> None:
    model = ARCHITECTURES[architecture]().eval()
    embedding = model.get_input_embeddings().weight.detach().clone()
    tensors = save_quantized(model, tmp_path, {"lm_head": parse("w8g32")})
    if architecture == "llama":  # the head was a second name of the embedding, which must be in the file all the same
        state = load_file(tmp_path / "model.safetensors")
        assert "model.embed_tokens.weight" in state
    loaded = load(tmp_path)
    assert isinstance(loaded.get_submodule("lm_head"), QuantizedLinear)
    assert torch.equal(loaded.get_input_embeddings().weight, embedding)
    hidden = loaded.model(input_ids=TOKENS).last_hidden_state
    torch.testing.assert_close(logits(loaded), hidden @ tensors["lm_head"].dequantize().t(), rtol=1e-4, atol=1e-4)


def test_tied_weights_are_one_tensor(tmp_path: Path) -> None:
    loaded = load(save_float(ARCHITECTURES["llama"](), tmp_path))
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def edit(directory: Path, change: dict[str, Tensor | None]) -> None:
    """Add tensors to the file, or take them out."""
    state = load_file(directory / "model.safetensors")
    for name, tensor in change.items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    save_file(state, directory / "model.safetensors")


def refusal(directory: Path, code: str) -> BitwrightError:
    with pytest.raises(BitwrightError) as caught:
        load(directory)
    assert caught.value.code == code
    assert caught.value.suggestion
    return caught.value


@pytest.mark.parametrize("quantize", [False, True], ids=["float", "quantized"])
def test_missing_and_unexpected_tensors_are_named(quantize: bool, tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"]()
    if quantize:
        save_quantized(model, tmp_path, {"model.layers.0.mlp.up_proj": parse("w8")})
    else:
        save_float(model, tmp_path)
    names = [f"model.layers.1.{name}.weight" for name in ("input_layernorm", "post_attention_layernorm")]
    names += [f"model.layers.1.self_attn.{name}_proj.weight" for name in "qkvo"]
    saved = load_file(tmp_path / "model.safetensors")
    edit(tmp_path, dict.fromkeys(names))
    error = refusal(tmp_path, "BW303")
    assert error.what.startswith("6 ")
    assert sum(name in error.what for name in names) == 5
    edit(tmp_path, {name: saved[name] for name in names} | {"model.layers.7.surprise": torch.ones(1)})
    assert "model.layers.7.surprise" in refusal(tmp_path, "BW303").what


def test_a_quantized_layer_without_a_place_is_named(tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"]()
    save_quantized(model, tmp_path, dict.fromkeys(block_linears(model), parse("w8")))
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_hidden_layers"] = 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    error = refusal(tmp_path, "BW303")
    assert "7 quantized layers" in error.what
    assert "model.layers.1.mlp.down_proj" in error.what


@pytest.mark.parametrize("quantize", [False, True], ids=["float", "quantized"])
def test_a_wrong_shape_names_tensor_shapes_and_field(quantize: bool, tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"]()
    if quantize:
        save_quantized(model, tmp_path, dict.fromkeys(block_linears(model), parse("w8")))
    else:
        save_float(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["intermediate_size"] = 100
    (tmp_path / "config.json").write_text(json.dumps(config))
    error = refusal(tmp_path, "BW304")
    assert "_proj" in error.what
    assert "96" in error.what
    assert "100" in error.what
    assert "intermediate_size = 100" in error.why


def test_a_wrong_shape_of_heads_is_explained(tmp_path: Path) -> None:
    save_float(ARCHITECTURES["llama"](), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["num_key_value_heads"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "num_key_value_heads x head_dim = 64" in refusal(tmp_path, "BW304").why


def test_a_wrong_dtype_is_named(tmp_path: Path) -> None:
    save_float(ARCHITECTURES["llama"](), tmp_path)
    edit(tmp_path, {"model.norm.weight": torch.ones(64, dtype=torch.int32)})
    assert "model.norm.weight" in refusal(tmp_path, "BW304").what


@pytest.mark.parametrize("method", ["aqlm", "exl3", "bitsandbytes", "fp8", "quark", "<nonsense>"])
def test_other_quantization_methods_are_refused_by_name(method: str, tmp_path: Path) -> None:
    save_float(ARCHITECTURES["llama"](), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert method in refusal(tmp_path, "BW311").what


def test_an_unfinished_output_is_refused(tmp_path: Path) -> None:
    save_float(ARCHITECTURES["llama"](), tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00002.safetensors")
    (tmp_path / ".bitwright").mkdir()
    (tmp_path / ".bitwright/journal.jsonl").touch()
    assert "again" in refusal(tmp_path, "BW308").suggestion


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path: Path) -> None:
    save_float(ARCHITECTURES["llama"](), tmp_path)
    tokenizer = byte_tokenizer(extra=VOCABULARY - 257 + 1)
    assert len(tokenizer) == VOCABULARY + 1
    tokenizer.save_pretrained(tmp_path)
    error = refusal(tmp_path, "BW312")
    assert f"{VOCABULARY + 1} tokens" in error.what
    assert f"for {VOCABULARY}" in error.what


@pytest.mark.parametrize("extra", [0, VOCABULARY - 257])
def test_a_tokenizer_with_as_many_or_fewer_tokens_is_fine(extra: int, tmp_path: Path) -> None:
    save_float(ARCHITECTURES["llama"](), tmp_path)
    byte_tokenizer(extra).save_pretrained(tmp_path)
    _, tokenizer = load_with_tokenizer(tmp_path)
    assert len(tokenizer) == 257 + extra


def test_a_model_without_a_tokenizer_loads_but_gives_none(tmp_path: Path) -> None:
    save_float(ARCHITECTURES["llama"](), tmp_path)
    load(tmp_path)
    with pytest.raises(BitwrightError, match="BW312"):
        load_with_tokenizer(tmp_path)


def test_a_damaged_tokenizer_is_refused(tmp_path: Path) -> None:
    save_float(ARCHITECTURES["llama"](), tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    refusal(tmp_path, "BW312")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_dtype_can_be_chosen(dtype: torch.dtype, tmp_path: Path) -> None:
    """Codes and scales stay; everything else is cast."""
    model = ARCHITECTURES["qwen2"]().to(torch.bfloat16).eval()
    tensors = save_quantized(model, tmp_path, dict.fromkeys(block_linears(model), parse("w4g8")))
    loaded = load(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    assert logits(loaded).dtype == dtype
    for name, tensor in tensors.items():
        assert torch.equal(loaded.get_submodule(name).dequantize(), tensor.dequantize())


@pytest.mark.parametrize("arguments", [{"dtype": torch.int8}, {"dtype": "float32"}, {"threads": 0}, {"threads": "2"}])
def test_arguments_are_checked_first(arguments: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(BitwrightError, match=f"BW201.*{next(iter(arguments))}"):
        load(tmp_path / "nothing here", **arguments)


def test_threads_are_set(tmp_path: Path) -> None:
    save_float(ARCHITECTURES["llama"](), tmp_path)
    before = torch.get_num_threads()
    try:
        load(tmp_path, threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_generation_settings_come_along(tmp_path: Path) -> None:
    save_float(ARCHITECTURES["llama"](), tmp_path)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [3, 5], "temperature": 0.1}')
    assert load(tmp_path).generation_config.eos_token_id == [3, 5]
    (tmp_path / "generation_config.json").write_text("[")
    assert "generation_config.json" in refusal(tmp_path, "BW307").what


def test_a_change_of_device_or_dtype_keeps_the_model_running(tmp_path: Path) -> None:
    model = ARCHITECTURES["llama"]().to(torch.bfloat16).eval()
    save_quantized(model, tmp_path, dict.fromkeys(block_linears(model), parse("w4g32-sf32")))
    loaded = load(tmp_path)
    expected = logits(load(tmp_path, dtype=torch.float32))
    assert torch.equal(logits(loaded.to(torch.float32)), expected)


def test_the_embedded_model_loads() -> None:
    model = load("demo:")
    assert model.dtype == torch.bfloat16
    assert torch.isfinite(logits(model)).all()


MODELS = ["BabyLlama-361-0.97M", "llama2xs-279K", "stories260K", "wikitext-qwen2-6m"]


@pytest.mark.parametrize("name", MODELS)
def test_trained_models_equal_transformers(name: str, shared_models: Path) -> None:
    directory = shared_models / name
    assert torch.equal(logits(load(directory)), logits(AutoModelForCausalLM.from_pretrained(directory)))


@pytest.mark.parametrize("scheme", ["w8", "w4g32", "w3g32", "nf4g32", "w8a8"])
@pytest.mark.parametrize("name", MODELS)
def test_trained_models_run_from_codes(name: str, scheme: str, shared_models: Path, tmp_path: Path) -> None:
    """Real weights: as the dense model of the stored numbers, and near the original at 8 bits."""
    model = AutoModelForCausalLM.from_pretrained(shared_models / name).to(torch.float32).eval()
    original = logits(model)
    tensors = save_quantized(model, tmp_path, dict.fromkeys(block_linears(model), parse(scheme)))
    output = logits(loading.load(tmp_path))
    expected = logits(dequantized(model, tensors))
    error = float((output - expected).norm() / expected.norm())
    assert error <= (0.05 if scheme == "w8a8" else 1e-5)
    if scheme == "w8":
        assert float((output - original).norm() / original.norm()) <= 0.02
