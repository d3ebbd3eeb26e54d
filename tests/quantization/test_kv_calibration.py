"""Calibration of keys and values: equal to a brute-force pass, in any order, resumable, and never used when stale."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import DynamicCache

from bitwright.core.errors import BitwrightError
from bitwright.core.kv_codes import decode_kv, encode_kv
from bitwright.core.kv_scheme import parse_kv
from bitwright.models.embedded_model import embedded_directory
from bitwright.models.kv_cache import QuantizedCache
from bitwright.models.kv_parameters import PARAMETERS_FILE, read_ranges
from bitwright.models.kv_ranges import Range, static_parameters
from bitwright.models.loading import load
from bitwright.quantization import kv_calibration
from bitwright.quantization.api import quantize
from bitwright.quantization.calibration import cut_windows
from bitwright.quantization.events import Stopped
from bitwright.quantization.kv_calibration import STATISTICS_FILES, calibrate
from tests.quantization.tiny import TEXT, save_model

SAMPLES, SEQLEN = 8, 24


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT)
    return path


def make(directory: Path, family: str = "llama") -> Path:
    save_model(directory, family)
    return directory


def brute_force(directory: Path, text: Path) -> dict[int, tuple[Tensor, Tensor]]:
    """Keys and values of every layer, as the cache of transformers holds them: [tokens, heads, head_dim]."""
    model: Any = load(directory)
    ids = kv_calibration.calibration_tokens(kv_calibration.open_checkpoint(directory), text, SAMPLES, SEQLEN, 0).windows
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache, use_cache=True)
    return {
        number: (layer.keys.transpose(1, 2).flatten(0, 1), layer.values.transpose(1, 2).flatten(0, 1))
        for number, layer in enumerate(cache.layers)
    }


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi", "gpt2", "gpt_neox", "opt", "gptj", "stablelm"])
def test_statistics_are_those_of_a_brute_force_pass(family: str, text: Path, tmp_path: Path) -> None:
    """E4."""
    directory = make(tmp_path / "model", family)
    made = calibrate(directory, dataset=text, samples=SAMPLES, seqlen=SEQLEN)
    assert set(made.files) == {*STATISTICS_FILES.values(), PARAMETERS_FILE}
    found = {side: load_file(directory / STATISTICS_FILES[side]) for side in ("key", "value")}
    for layer, states in brute_force(directory, text).items():
        for side, numbers in zip(("key", "value"), states, strict=True):
            expected = {
                "min": numbers.amin(0),
                "max": numbers.amax(0),
                "absmax": numbers.abs().amax(0),
                "mean": numbers.mean(0),
            }
            for end, tensor in expected.items():
                torch.testing.assert_close(found[side][f"{layer}.{end}"], tensor, atol=1e-4, rtol=1e-4)
    ranges = read_ranges(directory, 2)
    assert torch.equal(ranges[1]["key"].high, found["key"]["1.max"].amax(-1))
    inputs = load_file(directory / STATISTICS_FILES["inputs"])
    assert any(name.endswith("absmax") for name in inputs)


def test_the_order_of_samples_does_not_matter(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E5."""
    first, second = make(tmp_path / "first"), make(tmp_path / "second")
    calibrate(first, dataset=text, samples=SAMPLES, seqlen=SEQLEN)

    def shuffled(*arguments: Any, **keywords: Any) -> Any:
        tokens = cut_windows(*arguments, **keywords)
        return type(tokens)(windows=tokens.windows.flip(0), available=tokens.available, source=tokens.source)

    monkeypatch.setattr(kv_calibration, "cut_windows", shuffled)
    calibrate(second, dataset=text, samples=SAMPLES, seqlen=SEQLEN)
    for file in STATISTICS_FILES.values():
        one, other = load_file(first / file), load_file(second / file)
        for name, tensor in one.items():
            if name.endswith("mean"):
                torch.testing.assert_close(other[name], tensor, atol=1e-3, rtol=1e-3)
            else:
                assert torch.equal(other[name], tensor), name


def test_a_stopped_run_resumes_to_the_same_bytes(text: Path, tmp_path: Path) -> None:
    whole, parts = make(tmp_path / "whole"), make(tmp_path / "parts")
    settings: dict[str, Any] = {"dataset": text, "samples": 4, "seqlen": SEQLEN}
    calibrate(whole, **settings)
    with pytest.raises(Stopped):
        calibrate(parts, should_stop=lambda: True, **settings)
    assert not (parts / PARAMETERS_FILE).exists()
    load(parts)  # an unfinished calibration does not stand in the way of the model
    events = []
    calibrate(parts, on_event=events.append, **settings)
    assert [event.kind for event in events].count("resume") == 1
    for file in (*STATISTICS_FILES.values(), PARAMETERS_FILE):
        assert (whole / file).read_bytes() == (parts / file).read_bytes()
    assert not list(parts.glob(".*"))


def test_other_settings_do_not_resume(text: Path, tmp_path: Path) -> None:
    directory = make(tmp_path / "model")
    with pytest.raises(Stopped):
        calibrate(directory, dataset=text, samples=4, seqlen=SEQLEN, should_stop=lambda: True)
    with pytest.raises(BitwrightError) as refused:
        calibrate(directory, dataset=text, samples=3, seqlen=SEQLEN)
    assert refused.value.code == "BW207"
    calibrate(directory, dataset=text, samples=3, seqlen=SEQLEN, restart=True)


@pytest.mark.parametrize("scheme", ["int8-static", "int8-static-sym", "int8-static-head", "fp8-static"])
def test_a_calibrated_model_runs(scheme: str, text: Path, tmp_path: Path) -> None:
    directory = make(tmp_path / "model")
    calibrate(directory, dataset=text, samples=SAMPLES, seqlen=SEQLEN)
    model: Any = load(directory)
    ids = torch.randint(1, 30, (2, 20))
    cache = QuantizedCache(model, scheme)
    with torch.no_grad():
        found = model(input_ids=ids, past_key_values=cache).logits
        expected = model(input_ids=ids).logits
    assert cache.nbytes < 2 * 2 * 2 * 20 * 2 * 8 + 100
    assert float((found - expected).abs().mean()) < 0.2 * float(expected.std())


def test_quantized_models_are_calibrated_as_they_are(text: Path, tmp_path: Path) -> None:
    directory = make(tmp_path / "model")
    calibrate(directory, dataset=text, samples=SAMPLES, seqlen=SEQLEN)
    quantize(directory, tmp_path / "w4", scheme="w4g32")
    with pytest.raises(BitwrightError) as refused:
        QuantizedCache(load(tmp_path / "w4"), "int8-static")
    assert refused.value.code == "BW404"
    calibrate(tmp_path / "w4", dataset=text, samples=SAMPLES, seqlen=SEQLEN)
    QuantizedCache(load(tmp_path / "w4"), "int8-static")


def test_ranges_of_other_weights_are_refused(text: Path, tmp_path: Path) -> None:
    directory = make(tmp_path / "model")
    calibrate(directory, dataset=text, samples=2, seqlen=SEQLEN)
    other = Path(shutil.copytree(directory, tmp_path / "other"))
    read_ranges(other, 2)
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.self_attn.v_proj.weight"
    tensors[name] = tensors[name] * 2
    save_file(tensors, other / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(BitwrightError, match="other weights") as refused:
        read_ranges(other, 2)
    assert refused.value.code == "BW404"
    read_ranges(other, 2, model=directory)


def test_damaged_ranges_are_to_be_made_again(text: Path, tmp_path: Path) -> None:
    directory = make(tmp_path / "model")
    calibrate(directory, dataset=text, samples=2, seqlen=SEQLEN)
    whole = (directory / PARAMETERS_FILE).read_bytes()
    for damaged in (whole[:-5], whole[:4], b"", b"\xff" * 100):
        (directory / PARAMETERS_FILE).write_bytes(damaged)
        with pytest.raises(BitwrightError, match="is damaged") as refused:
            read_ranges(directory, 2)
        assert refused.value.code == "BW404"
        assert f"bitwright calibrate {directory}" in refused.value.suggestion
        assert "fetch" not in refused.value.suggestion


def test_the_embedded_model_is_called_by_its_name() -> None:
    with pytest.raises(BitwrightError) as refused:
        QuantizedCache(load("demo:"), "int8-static")
    assert (refused.value.code, refused.value.where) == ("BW404", "demo:")
    assert str(embedded_directory()) not in str(refused.value)
    assert "bitwright calibrate DIR" in refused.value.suggestion


def test_the_formulas_of_the_document() -> None:
    found = Range(torch.tensor([-1.0, -3.0]), torch.tensor([4.0, 2.0]))
    whole = static_parameters(found, parse_kv("int8-static").key)
    assert (float(whole.scale), float(whole.zero_point)) == (pytest.approx(7 / 255), 0.5)
    heads = static_parameters(found, parse_kv("int8-static-head").key)
    torch.testing.assert_close(heads.scale, torch.tensor([5 / 255, 5 / 255]))
    torch.testing.assert_close(heads.zero_point, torch.tensor([1.5, -0.5]))
    symmetric = static_parameters(Range(torch.tensor([-2.54]), torch.tensor([1.0])), parse_kv("int8-static-sym").key)
    assert float(symmetric.scale) == pytest.approx(0.02)


@pytest.mark.parametrize("name", ["int8-static", "int8-static-head", "int8-static-sym", "fp8-static"])
@pytest.mark.parametrize("value", [2.0, 0.0, -3.5, 1e-30])
def test_constants_are_exact_in_static_codes(name: str, value: float) -> None:
    """E2: one number that never changes, in one element or in many."""
    code, one = parse_kv(name).key, torch.tensor([value])
    parameters = static_parameters(Range(one, one), code)
    for x in (torch.full((1, 1, 1, 1), value), torch.full((2, 1, 5, 8), value)):
        back = decode_kv(encode_kv(x, code, parameters), code, x.shape[-1], parameters)
        if code.symmetric:  # one multiplication more
            torch.testing.assert_close(back, x, rtol=1e-6, atol=0)
        else:
            assert torch.equal(back, x)


@pytest.mark.parametrize("name", ["ptb", "c4", "wikitext2"])
def test_named_data_sets_fail_with_the_choices(name: str, tmp_path: Path) -> None:
    """E9."""
    with pytest.raises(BitwrightError) as refused:
        calibrate(make(tmp_path / "model"), dataset=name)
    assert refused.value.code == "BW402"
    assert "--calib-dataset ./my.txt" in refused.value.suggestion
    assert "calibration" in refused.value.suggestion


def test_named_data_sets_have_local_copies(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """E9."""
    monkeypatch.setenv("BITWRIGHT_CACHE", str(tmp_path))
    (tmp_path / "datasets").mkdir()
    shutil.copy(text, tmp_path / "datasets" / "ptb.txt")
    assert calibrate(make(tmp_path / "model"), dataset="ptb", samples=2, seqlen=SEQLEN).source == "ptb"
