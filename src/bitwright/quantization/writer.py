"""Turning a run's results into a checkpoint directory, file by file, the index last."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import CONFIG, INDEX
from bitwright.formats.checksums import CHECKSUMS, serialize_checksums
from bitwright.formats.directory import find_file
from bitwright.formats.safetensors_file import TensorSource
from bitwright.formats.storage import write_file
from bitwright.models.blocks import output_head
from bitwright.quantization.card import CARD_FILE, render_card
from bitwright.quantization.journal import UnitRecord
from bitwright.quantization.plan import Plan
from bitwright.quantization.report import REPORT_FILE, Report
from bitwright.quantization.sources import Source

__all__ = ["COMPANIONS", "check_companions", "finish_checkpoint", "shard_name", "tensor_bytes"]

# What belongs to a model besides its weights; copied byte for byte where it is there.
COMPANIONS = (
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "LICENSE",
    "qwen.tiktoken",
)  # fmt: skip


def shard_name(index: int, total: int) -> str:
    """The name of shard ``index`` (from 0) of ``total``, as every loader expects it."""
    return f"model-{index + 1:05d}-of-{total:05d}.safetensors"


def tensor_bytes(tensor: Tensor | TensorSource) -> int:
    count = tensor.dtype.itemsize
    for size in tensor.shape:
        count *= size
    return count


def check_companions(source: Source) -> None:
    """Find what is copied beside the weights while nothing has been done yet.

    Raises:
        BitwrightError: BW310 if one is a link that leads outside the model's directory.
    """
    _find_companions(source)


def finish_checkpoint(output: Path, source: Source, plan: Plan, units: Iterable[UnitRecord], report: Report) -> None:
    """Write everything beside the shards.

    The list of files comes first, so that what a kill leaves is known to be ours. The index comes last: while it is
    missing, loaders find no model.
    """
    units = list(units)
    weight_map = {tensor: unit.file for unit in units for tensor in unit.tensors}
    total = sum(size for unit in units for size in unit.tensors.values())
    index = _json({"metadata": {"total_size": total}, "weight_map": weight_map})
    beside = {path.name: [_read(path)] for path in _find_companions(source)}
    beside[CONFIG] = _json(_config(source, plan))
    hashes = {name: hashlib.sha256(b"".join(chunks)).hexdigest() for name, chunks in {**beside, INDEX: index}.items()}
    write_file(output / CHECKSUMS, [serialize_checksums({unit.file: unit.sha256 for unit in units} | hashes)])
    for name, chunks in beside.items():
        write_file(output / name, chunks)
    write_file(output / REPORT_FILE, _json(report.to_dict()))
    write_file(output / CARD_FILE, [render_card(report).encode()])
    write_file(output / INDEX, index)


def _find_companions(source: Source) -> list[Path]:
    if source.directory is None:
        return []
    found = [find_file(source.directory, name) for name in COMPANIONS]
    return [path for path in found if path is not None and path.is_file()]


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        what, suggestion = f"{path.name} cannot be read: {error.strerror}", "make it readable, or fetch this file again"
        raise BitwrightError("BW303", what, where=str(path), suggestion=suggestion) from error


def _config(source: Source, plan: Plan) -> dict[str, Any]:
    config = {key: value for key, value in source.config.items() if key != "auto_map"}
    config["quantization_config"] = plan.format.config(plan.records, _ignored(source, plan))
    if plan.untied:
        config["tie_word_embeddings"] = False
    return config


def _ignored(source: Source, plan: Plan) -> list[str]:
    """Linear layers in floating point. A tied head counts: readers that go by layer type would replace it."""
    head = output_head(source.model)
    names = list(plan.skipped)
    if head is not None and head[0] not in plan.schemes and head[0] not in names:
        names.append(head[0])
    return names


def _json(value: Any) -> list[bytes]:
    return [(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()]
