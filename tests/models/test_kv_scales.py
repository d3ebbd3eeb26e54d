"""Scales of keys and values in compressed-tensors checkpoints: written by calibration, read by others and by us."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from bitwright.cli import main
from bitwright.core.errors import ArgumentError, BitwrightError
from bitwright.formats import storage
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.formats.checksums import verify_files
from bitwright.models import kv_scales
from bitwright.models.kv_cache import QuantizedCache
from bitwright.models.kv_parameters import PARAMETERS_FILE, read_ranges
from bitwright.models.kv_scales import SCALES_FILE, read_scales, write_scales
from bitwright.models.loading import load
from bitwright.quantization.api import quantize
from bitwright.quantization.kv_calibration import calibrate

LAYERS = 5


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of 4 bits, and scales for 8-bit floats."""
    directory = tmp_path_factory.mktemp("kv") / "w4"
    quantize("demo:", directory, scheme="w4g64", format="compressed-tensors")
    calibrate(directory, samples=4, seqlen=64, kv_cache_scheme="fp8")
    return directory


@pytest.fixture
def model(calibrated: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(calibrated, tmp_path / "model"))


def tensors(directory: Path) -> dict[str, Any]:
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    return {name: load_file(directory / file)[name] for name, file in index.items()}


def test_every_layer_has_the_scales_of_its_range(calibrated: Path) -> None:
    ranges, stored = read_ranges(calibrated, LAYERS), tensors(calibrated)
    for layer in range(LAYERS):
        for side, name in (("key", "k_scale"), ("value", "v_scale")):
            scale = stored[f"model.layers.{layer}.self_attn.{name}"]
            largest = torch.maximum(ranges[layer][side].low.abs(), ranges[layer][side].high.abs()).amax()  # type: ignore[index]
            assert scale.shape == (1,) and scale.dtype == torch.float32
            assert float(scale) == pytest.approx(float(largest) / 448)


def test_the_configuration_says_what_vllm_asks_of_it(calibrated: Path) -> None:
    """vLLM takes 8 bits, float, one scale a tensor, symmetric; the package's own record accepts the whole."""
    record = json.loads((calibrated / "config.json").read_text())["quantization_config"]
    scheme = QuantizationConfig.model_validate({k: v for k, v in record.items() if k != "quant_method"}).kv_cache_scheme
    assert scheme is not None
    assert (scheme.num_bits, str(scheme.type), scheme.symmetric, scheme.dynamic) == (8, "float", True, False)
    assert scheme.strategy == "tensor"


def test_transformers_fills_its_attention_with_them(calibrated: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(calibrated)
    stored = tensors(calibrated)
    for layer in range(LAYERS):
        attention = model.model.layers[layer].self_attn
        for name in ("k_scale", "v_scale"):
            wanted = stored[f"model.layers.{layer}.self_attn.{name}"]
            torch.testing.assert_close(getattr(attention, name).float(), wanted, rtol=0.01, atol=0)


def test_files_and_sums_belong_together(calibrated: Path) -> None:
    assert SCALES_FILE in verify_files(calibrated)
    checkpoint = open_checkpoint(calibrated)
    assert SCALES_FILE in checkpoint.files
    assert not any(file.endswith(PARAMETERS_FILE) for file in checkpoint.files)


def test_a_cache_reads_them_where_there_are_no_ranges(model: Path) -> None:
    ids = torch.tensor([[5, 6, 7, 8, 9, 10]])
    loaded: Any = load(model, dtype=torch.float32)
    wanted = loaded(input_ids=ids, past_key_values=QuantizedCache(loaded, "fp8-static")).logits
    (model / PARAMETERS_FILE).unlink()
    found = loaded(input_ids=ids, past_key_values=QuantizedCache(loaded, "fp8-static")).logits
    torch.testing.assert_close(found, wanted)
    plain = loaded(input_ids=ids).logits
    for name in ("fp8-static", "int8-static-sym", "int8-static", "int8-static-head"):
        logits = loaded(input_ids=ids, past_key_values=QuantizedCache(loaded, name)).logits
        assert 0 < float((logits - plain).abs().max()) < 1.0


def test_scales_of_other_weights_are_refused(model: Path) -> None:
    (model / PARAMETERS_FILE).unlink()
    name = "model.layers.1.self_attn.v_proj.weight_packed"
    file = open_checkpoint(model).stored(name).file
    stored = load_file(model / file)
    stored[name] += 1
    save_file(stored, model / file)
    with pytest.raises(BitwrightError, match="calibrated for other weights") as refused:
        QuantizedCache(load(model), "fp8-static")
    assert refused.value.code == "BW404"


def test_scales_of_another_writer_are_believed(model: Path) -> None:
    """As llm-compressor writes them: no note of the weights, one scale a head, the model's dtype."""
    (model / PARAMETERS_FILE).unlink()
    stored = {name: tensor.bfloat16() for name, tensor in load_file(model / SCALES_FILE).items()}
    save_file({name: tensor.expand(2).reshape(2, 1, 1).clone() for name, tensor in stored.items()}, model / SCALES_FILE)
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"]["strategy"] = "attn_head"
    (model / "config.json").write_text(json.dumps(config))
    scales = read_scales(open_checkpoint(model))
    assert scales is not None
    assert scales[3]["key"].high.shape == (2,)
    assert float(scales[3]["key"].high[1]) == pytest.approx(448 * float(stored["model.layers.3.self_attn.k_scale"]))


@pytest.mark.parametrize(
    ("field", "value"), [("num_bits", 4), ("symmetric", False), ("dynamic", True), ("strategy", "channel")]
)
def test_other_kinds_are_refused_by_name(model: Path, field: str, value: Any) -> None:
    (model / PARAMETERS_FILE).unlink()
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"]["kv_cache_scheme"][field] = value
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitwrightError, match="kind that is not read"):
        QuantizedCache(load(model), "fp8-static")


def test_calibrating_again_replaces_them(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tensors(model)
    command = ["calibrate", str(model), "--calib-samples", "8", "--calib-seqlen", "64", "--plain"]
    assert main([*command, "--kv-cache-scheme", "int8"]) == 0
    assert SCALES_FILE in capsys.readouterr().out
    after, name = tensors(model), "model.layers.0.self_attn.k_scale"
    assert set(after) == set(before)
    assert float(after[name]) >= float(before[name]) * 448 / 127 * (1 - 1e-5)
    assert json.loads((model / "config.json").read_text())["quantization_config"]["kv_cache_scheme"]["type"] == "int"
    verify_files(model)
    assert read_ranges(model, LAYERS)


def with_scales_among_weights(model: Path) -> None:
    """As another writer leaves them: in a shard of weights, and no shard of their own."""
    weight_map = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    home = next(file for file in weight_map.values() if file != SCALES_FILE)
    save_file(load_file(model / home) | load_file(model / SCALES_FILE), model / home)
    weight_map = {name: home if file == SCALES_FILE else file for name, file in weight_map.items()}
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for name in (SCALES_FILE, PARAMETERS_FILE, "bitwright_files.json"):
        (model / name).unlink()


class Interruption(Exception):
    pass


@pytest.mark.parametrize("is_among_weights", [True, False])
def test_an_interruption_leaves_what_can_be_loaded(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_among_weights: bool
) -> None:
    """Before each file that is written or removed."""
    if is_among_weights:
        with_scales_among_weights(model)
    wanted, ranges = set(open_checkpoint(model).tensors), read_ranges(model, LAYERS)
    written = None
    for last in range(20):
        copy, calls = Path(shutil.copytree(model, tmp_path / str(last))), itertools.count()

        def stop(*given: Any, call: Any, calls: Any = calls, last: int = last) -> Any:
            if next(calls) == last:
                raise Interruption
            return call(*given)

        with monkeypatch.context() as patch:
            for name in ("write_file", "remove_file"):
                patch.setattr(kv_scales, name, functools.partial(stop, call=getattr(storage, name)))
            with contextlib.suppress(Interruption):
                written = write_scales(open_checkpoint(copy), ranges, "fp8")
        checkpoint = open_checkpoint(copy)
        assert set(checkpoint.tensors) == wanted
        assert read_scales(checkpoint) is not None
        if written is not None:
            break
    assert written is not None
    assert last == len(written) + 1  # the list of sums, or the shard that is removed
    assert {path.name for path in copy.glob("*.safetensors")} - {PARAMETERS_FILE} >= set(open_checkpoint(copy).files)
    load(copy)


def test_a_single_file_is_written_anew(model: Path) -> None:
    weights = {name: tensor for name, tensor in tensors(model).items() if "self_attn.k_scale" not in name}
    for path in [*model.glob("model*"), *model.glob("bitwright_files.json"), *model.glob("kv_*")]:
        path.unlink()
    save_file({name: tensor for name, tensor in weights.items() if "v_scale" not in name}, model / "model.safetensors")
    calibrate(model, samples=2, seqlen=32, kv_cache_scheme="fp8")
    assert {file.name for file in model.glob("model*")} == {"model.safetensors"}
    assert len(load_file(model / "model.safetensors")) == len(weights) + LAYERS
    (model / PARAMETERS_FILE).unlink()
    QuantizedCache(load(model), "fp8-static")


def test_saving_anew_leaves_them_out(model: Path, tmp_path: Path) -> None:
    """Whoever saves a model may have changed it."""
    load(model).save_pretrained(tmp_path / "anew")
    record = json.loads((tmp_path / "anew" / "config.json").read_text())["quantization_config"]
    assert record["kv_cache_scheme"] is None
    assert not any("k_scale" in name for name in open_checkpoint(tmp_path / "anew").tensors)


def test_what_cannot_have_them_is_refused_at_once(tmp_path: Path, model: Path) -> None:
    with pytest.raises(ArgumentError, match="compressed-tensors checkpoints"):
        calibrate("demo:", tmp_path, samples=2, seqlen=32, kv_cache_scheme="fp8")
    with pytest.raises(ArgumentError, match="accepted: fp8, int8"):
        calibrate(model, samples=2, seqlen=32, kv_cache_scheme="int4")
