"""The kinds of damage to a model directory, in one table: what is done, and who must refuse it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random

from tests.fuzz.damaged_contents import (
    CONFIG,
    INDEX,
    config_calls_remote_code,
    config_has_a_huge_number,
    config_has_a_name_twice,
    config_has_another_type,
    config_has_more_layers,
    config_is_huge,
    config_size_is_wrong,
    index_escapes,
    index_has_no_map,
    index_names_are_wrong,
    list_shards,
    numbers_are_infinite,
    only_pickles_are_left,
    quantization_is_no_object,
    quantization_is_unknown,
    quantization_lost_a_field,
    record_is_too_many,
    record_is_wrong,
    shard_is_a_pickle,
    shard_is_longer,
    shard_lies_about_its_header,
    shards_are_swapped,
    template_is_hostile,
    tensor_has_another_dtype,
    tensor_has_another_name,
    tensor_has_another_shape,
    tensor_is_gone,
    tensor_is_too_many,
    tensor_offsets_are_wrong,
    tokenizer_calls_remote_code,
    tokenizer_is_of_another_kind,
    work_is_unfinished,
)

__all__ = ["ALL", "Damage"]

JUNK = [b"", b"[]", b"null", b"5", b"{", b"\xff\xfe{}", b"[" * 100_000, b'{"a":' * 50_000, b"\0" * 64, b"<html>"]


@dataclass(frozen=True)
class Damage:
    """What is done, who must refuse it (see ``corruptions.Corrupted``), and what the model must have for it."""

    apply: Callable[[Path, Random], None]
    stage: str
    needs: frozenset[str] = frozenset()


# The damage to any file that must be there: its bytes, or what lies under its name.


def junk_bytes(path: Path, random: Random) -> None:
    path.write_bytes(random.choice(JUNK))


def cut_bytes(path: Path, random: Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: random.randrange(len(content.rstrip()))])


def flip_bytes(path: Path, random: Random) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(random.choice([1, 2, 8])):
        content[random.randrange(len(content))] ^= 1 << random.randrange(8)
    path.write_bytes(content)


def is_missing(path: Path, random: Random) -> None:
    path.unlink()


def is_directory(path: Path, random: Random) -> None:
    path.unlink()
    path.mkdir()


def is_pipe(path: Path, random: Random) -> None:
    path.unlink()
    os.mkfifo(path)


def links_outside(path: Path, random: Random) -> None:
    path.unlink()
    target = path.parent.parent / "outside" / path.name
    path.symlink_to(random.choice([target, Path("..") / "outside" / path.name, Path("/etc/passwd"), Path("/dev/zero")]))


def links_to_itself(path: Path, random: Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def links_nowhere(path: Path, random: Random) -> None:
    path.unlink()
    path.symlink_to("absent")


def _on(name: str, change: Callable[[Path, Random], None]) -> Callable[[Path, Random], None]:
    """The same damage to one file of a model (``*``: to any shard)."""

    def apply(model: Path, random: Random) -> None:
        change(random.choice(list_shards(model)) if name == "*" else model / name, random)

    apply.__name__ = f"{change.__name__} {name}"
    return apply


# Every way to damage a file as such: who refuses it, for files that must be there and for those that need not.
FILE_DAMAGE: list[tuple[Callable[[Path, Random], None], bool]] = [
    (junk_bytes, True), (cut_bytes, True), (flip_bytes, False), (is_missing, True), (is_directory, True),
    (is_pipe, True), (links_outside, True), (links_to_itself, True), (links_nowhere, True),
]  # fmt: skip


def _files(name: str, stage: str, *needs: str, skip: tuple[Callable[[Path, Random], None], ...] = ()) -> list[Damage]:
    return [
        Damage(_on(name, change), stage if is_certain else "maybe", frozenset(needs))
        for change, is_certain in FILE_DAMAGE
        if change not in skip
    ]


def _all(stage: str, *changes: Callable[[Path, Random], None], needs: str = "") -> list[Damage]:
    return [Damage(change, stage, frozenset(needs.split())) for change in changes]


# Without their index the shards are still found, by their numbers; a link that leads nowhere is no index either.
ALL: tuple[Damage, ...] = (
    *_files(CONFIG, "open"),
    *_files(INDEX, "open", "index", skip=(is_missing, links_nowhere)),
    Damage(_on(INDEX, is_missing), "maybe", frozenset({"index"})),
    Damage(_on(INDEX, links_nowhere), "open", frozenset({"index"})),
    *_files("*", "open"),
    *_files("tokenizer.json", "text", "tokenizer"),
    *_files("tokenizer_config.json", "maybe", "tokenizer"),
    *_all("open", config_has_a_name_twice, config_has_a_huge_number, config_is_huge),
    *_all("load", config_size_is_wrong, config_has_more_layers, config_has_another_type),
    *_all("maybe", config_calls_remote_code),
    *_all(
        "open",
        quantization_is_no_object,
        quantization_is_unknown,
        quantization_lost_a_field,
        needs="quantized",
    ),
    *_all("open", record_is_wrong, record_is_too_many, needs="native"),
    *_all(
        "open",
        index_escapes,
        index_names_are_wrong,
        index_has_no_map,
        shards_are_swapped,
        needs="index",
    ),
    *_all(
        "open",
        shard_is_longer,
        shard_lies_about_its_header,
        shard_is_a_pickle,
        only_pickles_are_left,
    ),
    *_all("open", work_is_unfinished, tensor_offsets_are_wrong),
    *_all("open", tensor_is_gone, tensor_has_another_name, needs="index"),
    *_all("load", tensor_is_gone, tensor_has_another_name, needs="single"),
    *_all(
        "load",
        tensor_has_another_dtype,
        tensor_has_another_shape,
        tensor_is_too_many,
        needs="single",
    ),
    *_all("load", tensor_has_another_shape, needs="index"),
    *_all("maybe", numbers_are_infinite),
    *_all("text", tokenizer_is_of_another_kind, needs="tokenizer"),
    *_all("maybe", tokenizer_calls_remote_code, template_is_hostile, needs="tokenizer"),
)
