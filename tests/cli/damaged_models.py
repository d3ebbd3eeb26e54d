"""A tiny model, its checkpoint and a text; ways to damage them; and the commands that then meet the damage."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

LAYER = "model.layers.0.mlp.down_proj.weight"
WEIGHTS = "model.safetensors"
QUANTIZE = ("quantize", "model", "-o", "out", "--scheme", "w4g32", "--no-check")
GENERATE, EVAL = ("generate", "made", "once"), ("eval", "made", "--reference", "model", "--text", "text.txt")
EVAL_MODEL, INSPECT = ("eval", "model", "--text", "text.txt"), ("inspect", "made")
CALIBRATE = (*QUANTIZE, "--calibration", "text.txt", "--seqlen", "16")


@dataclass(frozen=True)
class Folder:
    """Where a case lives: ``model`` (float), ``made`` (its checkpoint, if the case asks for it), ``out``, ``text``."""

    path: Path

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def made(self) -> Path:
        return self.path / "made"


def tree(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()
    }


def edit_config(directory: Path, **fields: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | fields))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def shard(folder: Folder) -> Path:
    return sorted(folder.made.glob("model-*.safetensors"))[1]


def truncate(folder: Folder) -> None:
    data = shard(folder).read_bytes()
    shard(folder).write_bytes(data[: len(data) // 2])


def flip_last_byte(folder: Folder) -> None:
    data = bytearray(shard(folder).read_bytes())
    data[-1] ^= 1
    shard(folder).write_bytes(data)


def lie_in_header(folder: Folder) -> None:
    header = b'{"a":{"dtype":"F32","shape":[4],"data_offsets":[0,999999]}}'
    (folder.model / WEIGHTS).write_bytes(struct.pack("<Q", len(header)) + header)


def finish_half(folder: Folder) -> None:
    (folder.made / "model.safetensors.index.json").unlink()
    (folder.made / ".bitwright").mkdir()
    (folder.made / ".bitwright/journal.jsonl").write_text("{}\n")


def pickle_instead(folder: Folder) -> None:
    (folder.model / WEIGHTS).rename(folder.model / "pytorch_model.bin")


def put_nan(folder: Folder) -> None:
    edit_tensors(folder.model / WEIGHTS, lambda tensors: tensors[LAYER][0, :3].fill_(float("nan")))


def explode(folder: Folder) -> None:
    """Weights that are finite, and whose products are not."""
    edit_tensors(folder.model / WEIGHTS, lambda tensors: tensors[LAYER].fill_(3e38))


def reshape(folder: Folder) -> None:
    edit_tensors(folder.model / WEIGHTS, lambda t: t.update({LAYER: t[LAYER][:, :7].contiguous()}))


def make_integer(folder: Folder) -> None:
    edit_tensors(folder.model / WEIGHTS, lambda tensors: tensors.update({LAYER: tensors[LAYER].view(torch.int32)}))


def drop_tensors(folder: Folder) -> None:
    edit_tensors(folder.model / WEIGHTS, lambda t: [t.pop(name) for name in list(t) if "mlp" in name][:0])


def add_tensor(folder: Folder) -> None:
    edit_tensors(folder.model / WEIGHTS, lambda t: t.update({"model.layers.0.extra.weight": torch.zeros(3)}))


def grow_tokenizer(folder: Folder, directory: str = "model", start: int = 50) -> None:
    path = folder.path / directory / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"]["vocab"] |= {f"<{number}>": number for number in range(start, start + 20)}
    path.write_text(json.dumps(tokenizer))


def swap_tokenizer(folder: Folder) -> None:
    path = folder.made / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(tokenizer))


def nothing(folder: Folder) -> None:
    return
