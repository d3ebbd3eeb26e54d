"""LMDeploy's document on KV cache INT8: its formula, its shell blocks, its names in Python."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from bitwright.cli import main
from bitwright.compat import lmdeploy
from bitwright.core.errors import BitwrightError, Notice
from bitwright.core.kv_codes import StaticParameters, decode_kv, encode_kv
from bitwright.core.kv_scheme import parse_kv
from bitwright.models.embedded_model import embedded_directory, read_text
from bitwright.models.kv_ranges import Range, static_parameters
from bitwright.quantization.api import quantize

DOCUMENT = Path(__file__).resolve().parents[4] / "shared" / "seeds" / "lmdeploy_kv_int8.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The models that the document names, and a local copy of its data set."""
    folder = tmp_path_factory.mktemp("document")
    shutil.copytree(embedded_directory(), folder / "internlm-chat-7b")
    quantize("demo:", folder / "internlm-chat-7b-4bit", scheme="w4g64-asym", algorithm="rtn", format="awq")
    (folder / "cache" / "datasets").mkdir(parents=True)
    (folder / "cache" / "datasets" / "ptb.txt").write_text(read_text("calibration"))
    return folder


def blocks() -> list[str]:
    if not DOCUMENT.is_file():
        pytest.skip("no document: it is looked for in a folder 'shared/seeds' beside the repository")
    found = re.findall(r"^```(?:bash|shell)\n(.*?)^```", DOCUMENT.read_text(encoding="utf-8"), flags=re.S | re.M)
    return [block for block in found if "lmdeploy" in block]


def test_the_three_blocks_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With ``bitwright`` for ``lmdeploy``, the model's folder for its name, and a sample length that it has."""
    monkeypatch.setenv("BITWRIGHT_CACHE", str(folder / "cache"))
    monkeypatch.chdir(folder)
    assert main(["lite", "calibrate", "internlm-chat-7b-4bit", "--calib-samples", "4", "--calib-seqlen", "64"]) == 0
    found = blocks()
    assert len(found) == 3
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    for block in found:
        lines = iter(["Hi", "/exit"])
        text = re.sub(r"#.*|export HF_MODEL=.*", "", block).replace("\\\n", " ")
        text = text.replace("$HF_MODEL", "internlm-chat-7b").replace("2048", "256").replace("128", "4")
        words = shlex.split(text)
        assert words[0] == "lmdeploy"
        assert main(words[1:]) == 0, capsys.readouterr().err
        shown = capsys.readouterr().out
        assert "calibrated 5 layers on 4 samples" in shown or "int8-static; memory" in shown
    assert (folder / "internlm-chat-7b" / "kv_parameters.safetensors").is_file()


def test_the_formula() -> None:
    """zp = (min + max) / 2, scale = (max - min) / 255, q = round((f - zp) / scale), f = q * scale + zp."""
    f = torch.empty(1, 2, 50, 8).uniform_(-3, 5)
    low, high = f.min(), f.max()
    code = parse_kv("int8-static").key
    parameters: StaticParameters = static_parameters(Range(low.view(1), high.view(1)), code)
    zero, scale = (low.double() + high.double()) / 2, (high.double() - low.double()) / 255
    assert float(parameters.zero_point) == pytest.approx(float(zero), rel=1e-6)
    assert float(parameters.scale) == pytest.approx(float(scale), rel=1e-6)
    coded = encode_kv(f, code, parameters)
    q = ((f.double() - zero) / scale).round().clamp(-128, 127)
    assert float((coded.codes.view(torch.int8).double() - q).abs().max()) <= 1
    assert float((coded.codes.view(torch.int8).double() == q).double().mean()) > 0.99
    back = decode_kv(coded, code, 8, parameters)
    assert float((back.double() - f.double()).abs().max()) <= float(scale) * 0.51


def test_python_names(tmp_path: Path) -> None:
    model = Path(shutil.copytree(embedded_directory(), tmp_path / "model"))
    with pytest.warns(Notice, match="none"):
        assert lmdeploy.kv_scheme(model, 0) == "none"
    with pytest.raises(BitwrightError, match="not calibrated"):
        lmdeploy.kv_scheme(model, 4)
    made = lmdeploy.calibrate(model, calib_dataset="calibration", calib_samples=4, calib_seqlen=64)
    assert (made.output, made.samples, made.seqlen) == (model, 4, 64)
    with pytest.warns(Notice, match="as in the document"):
        assert lmdeploy.kv_scheme(model, 4) == "int8-static"
    with pytest.warns(Notice, match="512 was taken"):
        lmdeploy.calibrate(model, calib_samples=2)
    with pytest.raises(BitwrightError, match="BW201"):
        lmdeploy.calibrate(model, device="npu")
    with pytest.raises(BitwrightError, match="quant policy is 5"):
        lmdeploy.kv_scheme(model, 5)
