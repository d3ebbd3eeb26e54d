"""Hundreds of corrupted model directories are opened: our own errors, each of a model's kind, and nothing touched."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest
import torch
from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import INDEX, open_checkpoint
from bitwright.formats.safetensors_file import serialize
from bitwright.formats.table import FORMATS, get_format
from bitwright.models.hf import load_tokenizer
from tests.formats.layers import decode_all, make_layer, write_checkpoint
from tests.fuzz import damaged_contents as contents
from tests.fuzz.corruptions import corruptions, find_kinds, snapshot
from tests.fuzz.damage import ALL
from tests.models.checkpoints import byte_tokenizer

COUNT = 150  # of each of four models: six hundred in all
SIZES = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def _quantized(directory: Path, format_name: str) -> Path:
    layers = {f"model.layers.{n}.mlp.up_proj": make_layer("w4g32", (96, 64), seed=n) for n in range(4)}
    write_checkpoint(directory, get_format(format_name), layers)
    config = json.loads((directory / "config.json").read_bytes())
    return _finish(directory, SIZES | {"quantization_config": config["quantization_config"]})


def _float(directory: Path) -> Path:
    directory.mkdir(parents=True)
    tensors = {f"model.layers.{n}.mlp.up_proj.weight": torch.randn(96, 64).bfloat16() for n in range(4)}
    (directory / "model.safetensors").write_bytes(b"".join(serialize(tensors | {"norm": torch.ones(3)})))
    return _finish(directory, SIZES)


def _finish(directory: Path, config: dict[str, object]) -> Path:
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}}}')
    (directory / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    return directory


def _shard(directory: Path) -> Path:
    """Three shards and their index instead of one file."""
    checkpoint = open_checkpoint(directory)
    weight_map, parts = {}, [dict[str, Tensor]() for _ in range(3)]
    for number, name in enumerate(checkpoint.tensors):
        parts[number % 3][name] = checkpoint.read(name)
        weight_map[name] = f"model-{number % 3 + 1:05d}-of-00003.safetensors"
    (directory / "model.safetensors").unlink()
    for number, tensors in enumerate(parts, 1):
        (directory / f"model-{number:05d}-of-00003.safetensors").write_bytes(b"".join(serialize(tensors)))
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return directory


MODELS: dict[str, Callable[[Path], Path]] = {
    "float in one file": _float,
    "float in shards": lambda directory: _shard(_float(directory)),
    "native in one file": lambda directory: _quantized(directory, "native"),
    "compressed-tensors in shards": lambda directory: _shard(_quantized(directory, "compressed-tensors")),
    "gptq in one file": lambda directory: _quantized(directory, "gptq"),
    "gptq_v2 in shards": lambda directory: _shard(_quantized(directory, "gptq_v2")),
    "awq in one file": lambda directory: _quantized(directory, "awq"),
}


def _open(model: Path) -> None:
    """All that this layer reads of a model: its configuration, its index, every layer and every tensor."""
    checkpoint = open_checkpoint(model)
    if checkpoint.quantization is not None:
        decode_all(checkpoint)
    for name in checkpoint.tensors:
        checkpoint.read(name)


@pytest.mark.parametrize("name", list(MODELS))
def test_corrupted_models_are_refused_by_our_own_errors_and_nothing_is_touched(workplace: Path, name: str) -> None:
    source = MODELS[name](workplace / "source")
    _open(source)
    refused: dict[str, int] = {}
    for corrupted in corruptions(source, workplace, seed=len(name), count=COUNT):
        before = snapshot(corrupted.outside), snapshot(corrupted.model)
        start, error = time.perf_counter(), None
        try:
            _open(corrupted.model)
        except BitwrightError as caught:
            error = caught
        assert time.perf_counter() - start < 20, f"{corrupted.name} takes too long"
        assert (snapshot(corrupted.outside), snapshot(corrupted.model)) == before, corrupted.name
        if error is None:
            assert corrupted.stage != "open", f"{corrupted.name} was accepted"
            continue
        message = str(error)
        assert error.code.startswith("BW3") and error.exit_status == 3, corrupted.name
        assert len(message) < 4000 and message.replace("\n", "").isprintable(), corrupted.name
        assert error.suggestion or error.why, f"{corrupted.name}: {message}"
        assert corrupted.stage != "text", f"{corrupted.name}: {message}"
        refused[error.code] = refused.get(error.code, 0) + 1
    assert sum(refused.values()) > COUNT // 3 and len(refused) >= 6, refused


def test_every_kind_of_damage_is_done_to_some_model(workplace: Path) -> None:
    done: set[str] = set()
    for name, make in MODELS.items():
        kinds = find_kinds(make(workplace / name))
        assert len(kinds) < COUNT
        done |= {damage.apply.__name__ for damage in kinds}
    assert done == {damage.apply.__name__ for damage in ALL}


def test_the_same_seed_gives_the_same_damage(workplace: Path) -> None:
    source = _float(workplace / "source")
    made = []
    for seed in (1, 1, 2):
        made.append([snapshot(corrupted.model) for corrupted in corruptions(source, workplace, seed=seed, count=30)])
    assert made[0] == made[1] and made[0] != made[2]


def test_every_format_that_is_written_is_among_the_models() -> None:
    written = {name.partition(" in ")[0] for name in MODELS} - {"float"}
    assert {entry.name for entry in FORMATS} == written | {"gptq_v1"}  # whose symmetric layers are those of gptq


@pytest.mark.parametrize("damage", [contents.tokenizer_calls_remote_code, contents.config_calls_remote_code])
def test_code_that_a_model_brings_is_neither_run_nor_offered(
    workplace: Path, damage: Callable[[Path, Random], None], capsys: pytest.CaptureFixture[str]
) -> None:
    byte_tokenizer().save_pretrained(workplace / "model")
    (workplace / "model" / "config.json").write_text(json.dumps(SIZES))
    damage(workplace / "model", Random(0))
    with contextlib.suppress(BitwrightError):
        load_tokenizer(workplace / "model")
    assert "custom code" not in str(capsys.readouterr())


def test_a_tokenizer_outside_of_the_model_is_refused(workplace: Path) -> None:
    byte_tokenizer().save_pretrained(workplace / "outside")
    (workplace / "model").mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (workplace / "model" / name).symlink_to(workplace / "outside" / name)
    with pytest.raises(BitwrightError, match="BW310"):
        load_tokenizer(workplace / "model")
