"""Corrupted copies of a model directory, seeded: configuration, index, shards, tokenizer, template, links.

``corruptions(source, workplace, seed=0, count=500)`` yields one copy after another; whatever is then run on ``model``
must end as ``stage`` says and leave ``outside``, where links and names of a corrupted model point, as it was
(``snapshot``).
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz.damage import ALL, Damage

__all__ = ["Corrupted", "corruptions", "find_kinds", "snapshot"]


@dataclass(frozen=True)
class Corrupted:
    """One corrupted copy.

    ``stage`` says who must refuse it: ``open`` whoever opens the checkpoint and reads its layers, ``load`` whoever
    builds the model, ``text`` whoever needs its tokenizer; ``maybe``: it may still be valid, or the damage is in
    numbers alone.
    """

    name: str
    stage: str
    model: Path
    outside: Path


def corruptions(source: Path, workplace: Path, *, seed: int = 0, count: int = 500) -> Iterator[Corrupted]:
    """Copy ``source`` to ``workplace/model``, damage it, yield it, remove it; ``count`` times, each kind in turn."""
    kinds = find_kinds(source)
    for number in range(count):
        damage = kinds[number % len(kinds)]
        random = Random(f"{seed}:{number}")
        model, outside = workplace / "model", workplace / "outside"
        shutil.copytree(source, model)
        outside.mkdir()
        (outside / "config.json").write_text('{"model_type": "llama"}')
        for path in model.glob("*.safetensors"):
            shutil.copyfile(path, outside / path.name)
        damage.apply(model, random)
        yield Corrupted(f"{number}: {damage.apply.__name__}", damage.stage, model, outside)
        shutil.rmtree(model)
        shutil.rmtree(outside)


def find_kinds(source: Path) -> list[Damage]:
    """The kinds of damage that can be done to a model."""
    return [damage for damage in ALL if damage.needs <= _features(source)]


def _features(source: Path) -> set[str]:
    """What a model directory has that can be damaged."""
    text = (source / "config.json").read_text(encoding="utf-8")
    features = {"quantized"} if '"quantization_config"' in text else {"float"}
    features |= {"native"} if '"quant_method": "bitwright"' in text else set()
    features |= {"index"} if (source / "model.safetensors.index.json").exists() else {"single"}
    return features | ({"tokenizer"} if (source / "tokenizer.json").exists() else set())


def snapshot(directory: Path) -> dict[str, str]:
    """Every file below a directory, and what is in it; links and pipes as such."""
    found = {}
    for path in sorted(directory.rglob("*")):
        name = str(path.relative_to(directory))
        if path.is_symlink():
            found[name] = "link to " + os.readlink(path)
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            found[name] = "directory" if path.is_dir() else "special"
    return found
