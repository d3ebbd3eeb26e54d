"""What inspect says is what lies in the files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import bitwright
from bitwright.cli import main
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.kernels.gpu import library
from tests.kernels.gpu.compilation_facts import VOLTA


def test_a_quantized_checkpoint(quantized: Path) -> None:
    found = bitwright.inspect(quantized)
    report = json.loads((quantized / "report.json").read_text())
    assert {layer.name for layer in found.layers} == set(report["layers"])
    assert found.format == report["format"]
    checkpoint = open_checkpoint(quantized)
    for layer in found.layers:
        entries = [s.entry for name, s in checkpoint.tensors.items() if name.startswith(f"{layer.name}.weight")]
        assert layer.bytes == sum(entry.end - entry.start for entry in entries)
        assert layer.bits_per_weight == 8 * layer.bytes / (layer.shape[0] * layer.shape[1])
        assert layer.error == report["layers"][layer.name]["relative_error"]
        assert layer.kernel in layer.kernels
    everything = sum(s.entry.end - s.entry.start for s in checkpoint.tensors.values())
    assert sum(layer.bytes for layer in found.layers) + sum(found.float_bytes.values()) == everything


def test_biases_are_not_part_of_a_layer(quantized: Path) -> None:
    found = bitwright.inspect(quantized)
    biased = [layer for layer in found.layers if layer.name.endswith("q_proj")]
    assert biased and all(4.0 < layer.bits_per_weight < 4.3 for layer in biased)


def test_a_float_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    found = bitwright.inspect("demo:")
    assert (found.format, found.layers, found.bits_per_weight) == ("float", (), None)
    assert set(found.float_bytes) == {"BF16"}
    assert main(["inspect", "demo:"]) == 0
    assert "no layer is quantized" in capsys.readouterr().out


def test_the_command(quantized: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(quantized), "--kernels"]) == 0
    out = capsys.readouterr().out
    assert "model.layers.0.self_attn.q_proj" in out
    assert "reference: accepts" in out
    assert main(["inspect", str(quantized), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["format"] == "compressed-tensors"


def test_kernels_of_a_gpu_are_explained_where_there_is_one(
    quantized: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not bitwright.inspect(quantized).layers[0].gpu_kernels or library.missing() is None
    monkeypatch.setattr(library, "missing", lambda: None)
    monkeypatch.setattr(library, "describe", lambda _device: VOLTA)
    assert main(["inspect", str(quantized), "--kernels"]) == 0
    out = capsys.readouterr().out
    assert "on the GPU" in out and "triton-int8: refuses: activations of int8 alone" in out
    assert "native: refuses: " in out.partition("on the GPU")[2]


@pytest.mark.parametrize("text", ["{", "[]", '{"layers": 3}', '{"layers": {"model.layers.0.self_attn.q_proj": []}}'])
def test_a_broken_report_is_as_good_as_none(quantized: Path, tmp_path: Path, text: str) -> None:
    for path in quantized.iterdir():
        if path.name != "report.json":
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "report.json").write_text(text)
    found = bitwright.inspect(tmp_path)
    assert found.layers and all(layer.error is None for layer in found.layers)
