"""W39: folders that are damaged, of another model, or made to do harm are refused by name, and nothing is run."""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.compat.neural_compressor.torch.quantization import RTNConfig, load, quantize, save
from bitwright.core.errors import BitwrightError
from tests.quantization.tiny import Plain

Tensors = dict[str, Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save(quantize(Plain(), RTNConfig(use_sym=False).set_local("embed", RTNConfig(dtype="fp32"))), tmp_path)
    return tmp_path


def change(folder: Path, edit: Callable[[Tensors], object]) -> None:
    tensors = torch.load(folder / "quantized_model.pt", weights_only=True)
    edit(tensors)
    torch.save(tensors, folder / "quantized_model.pt")


def refused(folder: Path, code: str, words: str, original: nn.Module | None = None) -> None:
    model = original or Plain(seed=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(BitwrightError, match=words) as caught:
        load(folder, original_model=model)
    assert caught.value.code == code
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


class Harmful:
    """Runs a command when it is unpickled by whoever trusts it."""

    def __init__(self, call: Callable[..., Any], *arguments: Any) -> None:
        self.call, self.arguments = call, arguments

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call, self.arguments


@pytest.mark.parametrize("call", [os.system, subprocess.getoutput])
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_the_file_is_not_run(folder: Path, call: Callable[..., Any], zipped: bool) -> None:
    trace = folder / "trace"
    harmful: Any = {"embed.weight": Harmful(call, f"touch {trace}")}
    if zipped:
        torch.save(harmful, folder / "quantized_model.pt")
    else:
        (folder / "quantized_model.pt").write_bytes(pickle.dumps(harmful))
    refused(folder, "BW305", "nothing in the file was run")
    assert not trace.exists()
    torch.load(folder / "quantized_model.pt", weights_only=False) if zipped else None
    assert trace.exists() == zipped  # it would have done harm


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_file_that_is_cut_off(folder: Path, keep: float) -> None:
    data = (folder / "quantized_model.pt").read_bytes()
    (folder / "quantized_model.pt").write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])
    refused(folder, "BW305", r"quantized_model\.pt is cut off")


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, {1: torch.ones(1)}, torch.ones(2)])
def test_a_file_of_something_else(folder: Path, value: Any) -> None:
    torch.save(value, folder / "quantized_model.pt")
    refused(folder, "BW305", "not a dictionary of tensors")


QWEIGHT, SCALES, ZEROS = (f"blocks.1.down.{field}" for field in ("qweight", "scales", "qzeros"))
DAMAGE: dict[str, tuple[Callable[[Tensors], object], str, str]] = {
    "missing": (lambda t: t.pop(SCALES), "BW303", rf"{SCALES} is missing"),
    "missing float": (lambda t: t.pop("embed.bias"), "BW303", r"embed\.bias"),
    "stray": (lambda t: t.update({"embed.extra": torch.ones(1)}), "BW303", r"embed\.extra"),
    "stray of a layer": (lambda t: t.update({f"{QWEIGHT}2": torch.ones(1)}), "BW303", rf"{QWEIGHT}2"),
    "shape": (lambda t: t.update({QWEIGHT: t[QWEIGHT][:, :-1]}), "BW304", QWEIGHT),
    "float shape": (lambda t: t.update({"embed.weight": torch.ones(3, 3)}), "BW304", r"embed\.weight is \[3, 3\]"),
    "dtype": (lambda t: t.update({ZEROS: t[ZEROS].long()}), "BW304", ZEROS),
    "nan": (lambda t: t[SCALES].fill_(torch.nan), "BW309", SCALES),
    "index": (lambda t: t.update({"blocks.1.down.g_idx": torch.full((64,), 9, dtype=torch.int32)}), "BW311", "g_idx"),
    "bias": (lambda t: t.update({"blocks.1.up.bias": torch.ones(3)}), "BW304", r"blocks\.1\.up\.bias"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_the_damaged_tensor_is_named(folder: Path, name: str) -> None:
    edit, code, words = DAMAGE[name]
    change(folder, edit)
    refused(folder, code, words)


@pytest.mark.parametrize(("edit", "words"), [
    (lambda record: record.update(format="other"), "not of this format"),
    (lambda record: record.update(version=2), "version 2"), (lambda record: record.pop("layers"), "records of layers"),
    (lambda record: record["layers"]["head"].update(shape=[0, 4]), "records of layers"),
    (lambda record: record["layers"]["head"].pop("scheme"), "records of layers"),
])  # fmt: skip
def test_the_record_is_checked(folder: Path, edit: Callable[[Any], object], words: str) -> None:
    record = json.loads((folder / "qconfig.json").read_text())
    edit(record)
    (folder / "qconfig.json").write_text(json.dumps(record))
    refused(folder, "BW311", words)


def test_a_record_that_is_no_json(folder: Path) -> None:
    (folder / "qconfig.json").write_text("{")
    refused(folder, "BW311", "not JSON")


@pytest.mark.parametrize("name", ["quantized_model.pt", "qconfig.json"])
def test_a_missing_file_is_named(folder: Path, name: str) -> None:
    (folder / name).unlink()
    refused(folder, "BW301", name)


def test_another_model_is_refused(folder: Path) -> None:
    refused(folder, "BW303", "blocks.2", original=Plain(blocks=2))
    refused(folder, "BW304", r"embed\.weight", original=Plain(width=64))


def test_memory_is_all_that_is_needed_to_read_it(folder: Path) -> None:
    """The file is a state dict like any other."""
    tensors = torch.load(io.BytesIO((folder / "quantized_model.pt").read_bytes()), weights_only=True)
    assert all(isinstance(tensor, Tensor) for tensor in tensors.values())
    assert torch.equal(tensors["embed.weight"], Plain().embed.weight)
