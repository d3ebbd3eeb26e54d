"""Damaged GPTQ and AWQ checkpoints: every one is refused with an error of ours, and a sound one is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.core.scheme_names import parse
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.formats.safetensors_file import serialize
from bitwright.formats.storage import write_file
from bitwright.models.loading import load
from tests.formats.layers import decode_all, scratch_directory
from tests.golden.write_gptq import AWQ, GPTQ
from tests.models.checkpoints import ARCHITECTURES, save_quantized

GOLDEN = Path(__file__).parents[1] / "golden"
DTYPES = (torch.int32, torch.int16, torch.float16, torch.float32, torch.int64, torch.uint8)


def rewritten(folder: Path, source: str, tensors: dict[str, Tensor]) -> None:
    write_file(folder / "model.safetensors", serialize(tensors))
    write_file(folder / "config.json", [(GOLDEN / source / "config.json").read_bytes()])


def golden(source: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / source / "model.safetensors")


@pytest.mark.parametrize(
    ("field", "change", "code"),
    [
        ("g_idx", lambda t: t + 1, "BW311"), ("g_idx", lambda t: t - 1, "BW311"), ("g_idx", lambda t: t * 0, "BW311"),
        ("g_idx", lambda t: t[:-1], "BW304"), ("g_idx", lambda t: t.long(), "BW304"),
        ("qweight", lambda t: t[:-1], "BW304"), ("qweight", lambda t: t.t().contiguous(), "BW304"),
        ("qweight", lambda t: t.float(), "BW304"), ("qweight", lambda t: t.flatten(), "BW304"),
        ("qweight", lambda t: t[:0], "BW304"), ("qweight", lambda t: t[:, :-1], "BW304"),
        ("qzeros", lambda t: t[:1], "BW304"), ("qzeros", lambda t: t.half(), "BW304"),
        ("qzeros", lambda t: t * 0, "BW311"),
        ("scales", lambda t: t * float("nan"), "BW309"), ("scales", lambda t: t / 0, "BW309"),
        ("scales", lambda t: t.int(), "BW304"), ("scales", lambda t: t[:, :1], "BW304"),
        ("qzeros", None, "BW303"), ("scales", None, "BW303"), ("qweight", None, "BW303"),
    ],
)  # fmt: skip
def test_one_wrong_tensor_is_enough(tmp_path: Path, field: str, change: Any, code: str) -> None:
    tensors = golden("gptq-v1-sym")
    name = f"model.layers.0.q_proj.{field}"
    changed = None if change is None else change(tensors.pop(name)).contiguous()
    if changed is None:
        del tensors[name]
        tensors["model.layers.0.k_proj.extra" if field == "qweight" else "model.norm.weight"] = torch.ones(2)
    else:
        tensors[name] = changed
    rewritten(tmp_path, "gptq-v1-sym", tensors)
    with pytest.raises(BitwrightError) as caught:
        decode_all(open_checkpoint(tmp_path))
    assert caught.value.code == code
    assert field in str(caught.value) or field == "qweight" or code == "BW311"


@settings(max_examples=150)
@given(st.sampled_from([*GPTQ, *AWQ]), st.data())
def test_any_damage_is_read_or_refused(source: str, data: st.DataObject) -> None:
    tensors = golden(source)
    for name in data.draw(st.lists(st.sampled_from(sorted(tensors)), min_size=1, max_size=3, unique=True)):
        kind = data.draw(st.sampled_from(["drop", "dtype", "cut", "turn", "flat", "noise"]))
        tensor = tensors.pop(name)
        if kind == "dtype":
            tensors[name] = tensor.to(data.draw(st.sampled_from(DTYPES)))
        elif kind == "cut":
            tensors[name] = tensor[: data.draw(st.integers(0, tensor.shape[0]))].clone()
        elif kind == "turn":
            tensors[name] = tensor.t().contiguous()
        elif kind == "flat":
            tensors[name] = tensor.flatten()
        elif kind == "noise":
            noise = torch.randint(0, 256, (tensor.numel() * tensor.element_size(),), dtype=torch.uint8)
            tensors[name] = noise.view(tensor.dtype).view(tensor.shape)
    tensors = tensors or {"a": torch.ones(1)}
    with scratch_directory() as folder:
        rewritten(folder, source, tensors)
        try:
            decode_all(open_checkpoint(folder))
        except BitwrightError as error:
            assert error.code[:3] == "BW3"


def llama(folder: Path, **extra: Tensor) -> Path:
    """A GPTQ checkpoint of a model without biases, with some more tensors."""
    torch.manual_seed(2)
    model = ARCHITECTURES["llama"]()
    names = [f"model.layers.{block}.self_attn.q_proj" for block in (0, 1)]
    schemes = dict.fromkeys(names, parse("w4g32"))
    save_quantized(model, folder, schemes, format="gptq")
    path = folder / "model.safetensors"
    write_file(path, serialize({**load_file(path), **extra}))
    return folder


def test_biases_of_zeros_that_a_model_has_not_are_dropped(tmp_path: Path) -> None:
    """Old writers give every quantized layer a bias."""
    bias = "model.layers.0.self_attn.q_proj.bias"
    loaded = load(llama(tmp_path, **{bias: torch.zeros(64, dtype=torch.float16)}))
    assert loaded.get_submodule("model.layers.0.self_attn.q_proj").bias is None


@pytest.mark.parametrize(
    ("bias", "code"),
    [(torch.ones(64), "BW303"), (torch.zeros(63), "BW304"), (torch.zeros(64, dtype=torch.int32), "BW304")],
)
def test_other_biases_that_a_model_has_not_are_refused(tmp_path: Path, bias: Tensor, code: str) -> None:
    folder = llama(tmp_path, **{"model.layers.1.self_attn.q_proj.bias": bias})
    with pytest.raises(BitwrightError) as caught:
        load(folder)
    assert caught.value.code == code


def test_a_layer_of_another_size_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = llama(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_attention_heads": 8, "head_dim": 16}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BitwrightError, match=r"BW304.*q_proj"):
        load(folder)
