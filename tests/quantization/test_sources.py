"""One model from one file, from shards, from memory, in any float dtype: equal codes, and float tensors untouched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bitwright.core.errors import BitwrightError
from bitwright.core.qtensor import QuantizedTensor
from bitwright.core.scheme_names import parse
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.formats.table import find_format
from bitwright.models.loading import load
from bitwright.quantization.api import quantize
from bitwright.quantization.sources import DiskSource, MemorySource, refuse_nonfinite
from tests.quantization.tiny import Plain, build_model, digests, file_tensors, rewrite_tensors, save_model

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def decoded(directory: Path) -> dict[str, QuantizedTensor]:
    """Every quantized layer of a checkpoint."""
    checkpoint = open_checkpoint(directory)
    assert checkpoint.quantization is not None
    layout = find_format(checkpoint.quantization)
    return {name: layout.decode(checkpoint, name, record) for name, record in layout.layers(checkpoint).items()}


def same_quantized(left: QuantizedTensor, right: QuantizedTensor) -> bool:
    assert isinstance(left.scale, Tensor) and isinstance(right.scale, Tensor)
    return torch.equal(left.codes, right.codes) and torch.equal(left.scale.float(), right.scale.float())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_are_those_of_the_float32_values(tmp_path: Path, dtype: torch.dtype) -> None:  # W37
    model = save_model(tmp_path / "model", "llama", dtype=dtype)
    for format in ("native", "compressed-tensors"):
        quantize(tmp_path / "model", tmp_path / format, scheme="w4g32-asym", format=format)
        layers = decoded(tmp_path / format)
        assert len(layers) == 14
        for name, tensor in layers.items():
            weight = model.get_submodule(name).weight.detach().to(torch.float32)
            assert same_quantized(tensor, QuantizedTensor.quantize(weight, tensor.scheme)), name
    loaded = load(tmp_path / "native")
    assert loaded.dtype == dtype
    logits = loaded(torch.arange(12)[None]).logits
    assert logits.dtype == dtype and torch.isfinite(logits).all()


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
@pytest.mark.parametrize("scheme", ["w4g32", "nf4g32-dq"])
def test_shards_one_file_and_memory_give_the_same_tensors(tmp_path: Path, family: str, scheme: str) -> None:  # W35
    model = save_model(tmp_path / "single", family)
    save_model(tmp_path / "sharded", family, shard="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    tensors = []
    for number, source in enumerate((tmp_path / "single", tmp_path / "sharded", model)):
        report = quantize(source, tmp_path / str(number), scheme=scheme)
        tensors.append(file_tensors(tmp_path / str(number)))
        assert report.source_bytes == sum(tensor.numel() * 4 for tensor in load_shards(tmp_path / "sharded").values())
    for other in tensors[1:]:
        assert other.keys() == tensors[0].keys()
        assert all(torch.equal(tensors[0][name], other[name]) for name in other)
    configs = [json.loads((tmp_path / str(number) / "config.json").read_text()) for number in range(3)]
    assert configs[0] == configs[1]
    assert configs[0]["quantization_config"] == configs[2]["quantization_config"]
    ids = torch.arange(20)[None]
    assert torch.equal(load(tmp_path / "0")(ids).logits, load(tmp_path / "2")(ids).logits)


def load_shards(directory: Path) -> dict[str, Tensor]:
    return file_tensors(directory)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt", "gpt_neox"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_quantized_is_stored_byte_for_byte(tmp_path: Path, family: str, dtype: torch.dtype) -> None:  # W40
    save_model(tmp_path / "model", family, dtype=dtype)
    report = quantize(tmp_path / "model", tmp_path / "out", scheme="w4g32")
    before, after = load_file(tmp_path / "model/model.safetensors"), file_tensors(tmp_path / "out")
    renamed = {"embed_out.weight": "lm_head.weight"}
    kept = [name for name in before if renamed.get(name, name).removesuffix(".weight") not in report.layers]
    assert any("embed" in name or "wte" in name for name in kept) and any(
        "norm" in name or "ln_" in name for name in kept
    )
    for name in kept:
        stored = after[renamed.get(name, name)]
        assert stored.dtype == before[name].dtype, name
        assert torch.equal(stored.view(torch.uint8), before[name].view(torch.uint8)), name
    # The checkpoint holds all that the model needs: nothing of the original is read again.
    (tmp_path / "model").rename(tmp_path / "gone")
    assert load(tmp_path / "out")(torch.arange(9)[None]).logits.shape == (1, 9, 32)


def test_a_tied_head_stays_tied_and_is_stored_once(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "qwen2")
    report = quantize(tmp_path / "model", tmp_path / "out", scheme="w4g32")
    assert "lm_head.weight" not in file_tensors(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["tie_word_embeddings"] is True and "lm_head" in config["quantization_config"]["ignore"]
    assert "lm_head" in report.unquantized
    model = load(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("family", ["qwen2", "llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
def test_an_override_quantizes_the_head_and_leaves_the_embedding(
    tmp_path: Path, family: str, calibrated: bool
) -> None:  # W14, W25
    model = save_model(tmp_path / "model", family)
    head = "lm_head"
    embedding = model.get_input_embeddings().weight.detach().clone()
    (tmp_path / "text").write_text("a model that reads itself " * 8)
    arguments = {"calibration": tmp_path / "text", "samples": 2, "seqlen": 8} if calibrated else {}
    report = quantize(tmp_path / "model", tmp_path / "out", scheme="w8", overrides=[f"{head}=w8g32"], **arguments)
    assert report.layers[head]["scheme"].startswith("w8g32") and head not in report.unquantized
    assert json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"] is False
    loaded = load(tmp_path / "out")
    assert torch.equal(loaded.get_input_embeddings().weight, embedding)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        exact, found = model(ids).logits.flatten(), loaded(ids).logits.flatten()
    assert torch.corrcoef(torch.stack([exact, found]))[0, 1] > 0.99
    expected = QuantizedTensor.quantize(model.get_output_embeddings().weight.detach(), parse("w8g32").weight)
    assert same_quantized(decoded(tmp_path / "out")[head], expected)


def test_a_module_in_memory_is_not_changed(tmp_path: Path) -> None:
    model = build_model("gpt2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {name: id(module) for name, module in model.named_modules()}
    quantize(model, tmp_path / "out", scheme="w2g32", overrides=["lm_head=w8"])
    assert {name: id(module) for name, module in model.named_modules()} == modules
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert model.lm_head.weight is model.transformer.wte.weight


class Odd(Plain):
    """State that is no matrix of floats: scalars, whole numbers, views, a batch norm's counter."""

    def __init__(self) -> None:
        super().__init__(width=32, blocks=2)
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.register_buffer("step", torch.tensor(3))
        self.register_buffer("table", torch.arange(6).view(2, 3))
        self.register_buffer("turned", torch.arange(12.0).view(3, 4).t())
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("scratch", torch.zeros(4), persistent=False)
        self.counter = nn.BatchNorm1d(4)
        self.blocks[0].register_buffer("inner", torch.tensor([1, 2, 3], dtype=torch.int16))


def test_scalars_whole_numbers_and_views_are_stored_as_they_are(tmp_path: Path) -> None:
    model = Odd()
    quantize(model, tmp_path / "out", scheme="w4g32")
    found = file_tensors(tmp_path / "out")
    for name in ("scale", "step", "table", "turned", "flags", "counter.num_batches_tracked", "blocks.0.inner"):
        expected = model.state_dict()[name]
        assert found[name].dtype == expected.dtype and torch.equal(found[name], expected), name
    assert "scratch" not in found


def test_a_change_of_a_module_in_memory_is_another_model(tmp_path: Path) -> None:
    model = Odd()
    before = MemorySource(model).identity()
    assert MemorySource(model).identity() == before
    with torch.no_grad():
        model.scale.add_(1)
    assert MemorySource(model).identity() != before


def test_the_identity_does_not_depend_on_how_bytes_are_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Odd()
    whole = MemorySource(model).identity()
    monkeypatch.setattr("bitwright.quantization.sources.MOVED", 5)
    assert MemorySource(model).identity() == whole
    with torch.no_grad():
        model.blocks[0].up.weight[3, 5] = torch.nan
    with pytest.raises(BitwrightError, match=r"blocks.0.up.weight \(1\)"):
        refuse_nonfinite(MemorySource(model))


def test_tensors_without_numbers_are_refused_by_name(tmp_path: Path) -> None:
    model = Plain(width=32, blocks=2)
    model.blocks[1].up.to("meta")
    with pytest.raises(
        BitwrightError, match=r"2 tensors of the module.*blocks.1.up.bias, blocks.1.up.weight"
    ) as caught:
        quantize(model, tmp_path / "out", scheme="w4g32")
    assert caught.value.code == "BW303" and not (tmp_path / "out").exists()


def test_a_file_cut_off_after_it_was_opened_is_reported_by_the_scan(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    source = DiskSource(tmp_path / "model")
    path = tmp_path / "model/model.safetensors"
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(BitwrightError, match="BW302"):
        refuse_nonfinite(source)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_every_number_that_is_not_finite_is_counted(dtype: torch.dtype, value: float) -> None:
    model = Plain(width=32, blocks=1).to(dtype)
    with torch.no_grad():
        model.blocks[0].up.weight[3, 5] = value
        model.blocks[0].up.weight[0, 0] = value
        model.head.bias[1] = value
    with pytest.raises(BitwrightError) as caught:
        refuse_nonfinite(MemorySource(model))
    assert caught.value.code == "BW309"
    assert "2 tensors" in caught.value.what
    assert "blocks.0.up.weight (2)" in caught.value.what and "head.bias (1)" in caught.value.what


def test_the_largest_finite_numbers_are_not_mistaken(tmp_path: Path) -> None:
    for dtype in DTYPES:
        model = Plain(width=32, blocks=1).to(dtype)
        with torch.no_grad():
            model.head.bias.fill_(torch.finfo(dtype).max)
        refuse_nonfinite(MemorySource(model))


def test_files_may_lack_the_base_models_prefix_or_hold_old_constants(tmp_path: Path) -> None:
    """As GPT-2's own checkpoint does."""
    save_model(tmp_path / "model", "gpt2")
    quantize(tmp_path / "model", tmp_path / "plain", scheme="w4g32")
    path = tmp_path / "model/model.safetensors"
    tensors = {name.removeprefix("transformer."): tensor for name, tensor in load_file(path).items()}
    tensors |= {f"h.{block}.attn.bias": torch.ones(1, 1, 128, 128) for block in range(2)}
    tensors |= {f"h.{block}.attn.masked_bias": torch.tensor(-1e4) for block in range(2)}
    save_file(tensors, path, {"format": "pt"})
    quantize(tmp_path / "model", tmp_path / "bare", scheme="w4g32")
    left, right = file_tensors(tmp_path / "plain"), file_tensors(tmp_path / "bare")
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert load(tmp_path / "bare")(torch.arange(5)[None]).logits.shape == (1, 5, 32)


def test_missing_extra_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    kept = load_file(tmp_path / "model/model.safetensors")["model.norm.weight"]
    cases = {
        "BW303": [{"model.norm.weight": None}, {"model.surplus.weight": torch.ones(3)}],
        "BW304": [{"model.norm.weight": torch.ones(33)}],
    }
    for code, changes in cases.items():
        for change in changes:
            rewrite_tensors(tmp_path / "model", change)
            with pytest.raises(BitwrightError) as caught:
                DiskSource(tmp_path / "model")
            assert caught.value.code == code and next(iter(change)) in caught.value.what
            rewrite_tensors(tmp_path / "model", {"model.norm.weight": kept, "model.surplus.weight": None})
    DiskSource(tmp_path / "model")


def test_a_quantized_model_is_not_quantized_again(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    quantize(tmp_path / "model", tmp_path / "out", scheme="w4g32")
    with pytest.raises(BitwrightError) as caught:
        quantize(tmp_path / "out", tmp_path / "again", scheme="w4g32")
    assert caught.value.code == "BW201" and "quantized already" in caught.value.what
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
@pytest.mark.parametrize("claimed", [None, "float32", "float16"])
def test_files_of_another_dtype_than_the_configuration_names(
    tmp_path: Path, claimed: str | None, calibrated: bool
) -> None:
    """Codes and float tensors come from what is stored; calibration runs all the same."""
    model = save_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    path = tmp_path / "model/config.json"
    config = json.loads(path.read_text())
    config.pop("dtype")
    path.write_text(json.dumps(config | ({"dtype": claimed} if claimed else {})))
    (tmp_path / "text").write_text("a model that reads itself " * 8)
    arguments = {"calibration": tmp_path / "text", "samples": 2, "seqlen": 8} if calibrated else {}
    quantize(tmp_path / "model", tmp_path / "out", scheme="w4g32", format="native", **arguments)
    for name, tensor in decoded(tmp_path / "out").items():
        weight = model.get_submodule(name).weight.detach().to(torch.float32)
        assert same_quantized(tensor, QuantizedTensor.quantize(weight, tensor.scheme))
    assert torch.equal(file_tensors(tmp_path / "out")["model.norm.weight"], model.model.norm.weight)


@pytest.mark.parametrize("calibrated", [False, True], ids=["data-free", "calibrated"])
def test_files_of_mixed_dtypes(tmp_path: Path, calibrated: bool) -> None:
    """Float32 norms in a bfloat16 model."""
    save_model(tmp_path / "model", "llama", dtype=torch.bfloat16)
    path = tmp_path / "model/model.safetensors"
    tensors = load_file(path)
    norms = {name: tensor.float() for name, tensor in tensors.items() if "norm" in name}
    rewrite_tensors(tmp_path / "model", norms)
    (tmp_path / "text").write_text("a model that reads itself " * 8)
    arguments = {"calibration": tmp_path / "text", "samples": 2, "seqlen": 8} if calibrated else {}
    quantize(tmp_path / "model", tmp_path / "out", scheme="w4g32", **arguments)
    found = file_tensors(tmp_path / "out")
    assert all(found[name].dtype == torch.float32 and torch.equal(found[name], norm) for name, norm in norms.items())


def test_a_module_in_memory_is_stored_with_its_own_dtype(tmp_path: Path) -> None:
    model = build_model("llama").to(torch.bfloat16)  # its configuration still says float32
    quantize(model, tmp_path / "out", scheme="w4g32")
    assert load(tmp_path / "out").dtype == torch.bfloat16


def test_equal_models_in_two_places_give_equal_weights(tmp_path: Path) -> None:
    for place in ("a", "b"):
        save_model(tmp_path / place, "llama")
        quantize(tmp_path / place, tmp_path / f"{place}-out", scheme="w4g32")
    left, right = digests(tmp_path / "a-out"), digests(tmp_path / "b-out")
    differing = {name for name in left if left[name] != right[name]}
    assert differing <= {"report.json", "README.md"}  # they name where the model came from


def test_the_identity_sees_a_change_at_the_start_the_middle_and_the_end(tmp_path: Path) -> None:
    save_model(tmp_path, "llama", hidden_size=256, intermediate_size=1024, vocab_size=2048)
    path = tmp_path / "model.safetensors"
    status = path.stat()
    assert status.st_size > 5 << 20
    source = DiskSource(tmp_path)
    before = source.identity()
    for position in (100, status.st_size // 2 + 9, status.st_size - 1):
        content = bytearray(path.read_bytes())
        content[position] ^= 1
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        after = source.identity()
        assert after != before
        before = after
