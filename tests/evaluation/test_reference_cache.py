"""The cache of reference logits: exact, used, bounded, and never in the way."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

from bitwright.core.errors import BitwrightError
from bitwright.evaluation import reference_cache
from bitwright.evaluation.reference_cache import HEADER, CachedLogits, LogitCache, model_fingerprint, open_cache
from bitwright.evaluation.windows import TokenWindows, cut_text
from bitwright.formats.checkpoint import open_checkpoint

TEXT = cut_text(torch.randint(64, (70,), generator=torch.Generator().manual_seed(0)), seqlen=16, source="it")


SIZE = TEXT.predicted * 64 * 4 + len(TEXT.windows) * HEADER  # of one model's logits on it


def opened(root: Path, *, text: TokenWindows = TEXT, limit: int = 1 << 30, **facts: object) -> LogitCache | None:
    known = {"model": "m", "vocabulary": 64, "dtype": torch.float32, "batch": 2} | facts
    return open_cache(root, text=text, limit=limit, **known)  # type: ignore[arg-type]


def refuse() -> nn.Module:
    raise AssertionError("the model was loaded")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_come_back_to_the_last_bit_without_the_model(
    model: LlamaForCausalLM, tmp_path: Path, dtype: torch.dtype
) -> None:
    first = CachedLogits(lambda: model.to(dtype), TEXT, opened(tmp_path))
    second = CachedLogits(refuse, TEXT, opened(tmp_path))
    for numbers in TEXT.batches(2):
        computed, kept = first(numbers), second(numbers)
        assert kept.dtype == dtype and torch.equal(computed, kept)
    assert first.computed == len(TEXT.windows) and second.computed == 0


def test_without_a_cache_every_call_computes(model: LlamaForCausalLM) -> None:
    source = CachedLogits(lambda: model, TEXT, None)
    assert torch.equal(source([0, 1]), source([0, 1])) and source.computed == 4


@pytest.mark.parametrize("damage", ["truncated", "empty", "header", "other", "missing", "link", "flipped"])
def test_damaged_files_are_computed_again(model: LlamaForCausalLM, tmp_path: Path, damage: str) -> None:
    cache = opened(tmp_path)
    assert cache is not None
    wanted = CachedLogits(lambda: model, TEXT, cache)([0, 1])
    path = cache.directory / "000001.safetensors"
    content = path.read_bytes()
    if damage == "other":
        cache.write(1, torch.zeros(3, 64))
    elif damage == "missing":
        path.unlink()
    elif damage == "flipped":  # one bit of one number
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :])
    elif damage == "link":
        path.unlink()
        path.symlink_to(tmp_path / "nowhere")
    else:
        path.write_bytes({"truncated": content[:-8], "empty": b"", "header": b"\xff" * 8 + content[8:]}[damage])
    again = CachedLogits(lambda: model, TEXT, cache)
    assert torch.equal(again([0, 1]), wanted) and again.computed == 2
    assert torch.equal(CachedLogits(refuse, TEXT, cache)([0, 1]), wanted)


def test_every_fact_that_changes_logits_changes_the_key(tmp_path: Path) -> None:
    other_tokens = replace(TEXT, windows=(TEXT.windows[0].flip(0), *TEXT.windows[1:]))
    ids = torch.cat(list(TEXT.windows))
    other_windows = cut_text(ids, seqlen=8, source="it")
    caches = [
        opened(tmp_path),
        opened(tmp_path, model="n"),
        opened(tmp_path, dtype=torch.bfloat16),
        opened(tmp_path, batch=3),
        opened(tmp_path, text=other_tokens),
        opened(tmp_path, text=other_windows),
    ]
    assert len({cache.directory for cache in caches if cache is not None}) == len(caches)
    again = opened(tmp_path)
    assert again is not None and caches[0] is not None and again.directory == caches[0].directory


def test_the_fingerprint_is_of_the_files(base: Path, tmp_path: Path) -> None:
    files = list(open_checkpoint(base).files)
    first = model_fingerprint(base, files)
    assert first == model_fingerprint(base, files)
    for name in ("config.json", *files):
        (tmp_path / name).write_bytes((base / name).read_bytes())
    assert model_fingerprint(tmp_path, files) == first
    for name in ("config.json", *files):
        content = (base / name).read_bytes()
        (tmp_path / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert model_fingerprint(tmp_path, files) != first
        (tmp_path / name).write_bytes(content)


def test_what_is_over_the_limit_is_not_kept_and_told(tmp_path: Path) -> None:
    said: list[str] = []
    assert opened(tmp_path, limit=SIZE - 1, on_failure=said.append) is None and not (tmp_path / "reference").exists()
    assert len(said) == 1 and "BITWRIGHT_CACHE_LIMIT" in said[0] and "computed for each model" in said[0]
    assert opened(tmp_path, limit=SIZE, on_failure=said.append) is not None and len(said) == 1


def test_the_limit_is_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found() -> LogitCache | None:
        return open_cache(tmp_path, model="m", text=TEXT, vocabulary=64, dtype=torch.float32, batch=2)

    monkeypatch.setenv("BITWRIGHT_CACHE_LIMIT", "0.00001")
    assert SIZE > 0.00001 * 2**30 and found() is None
    monkeypatch.setenv("BITWRIGHT_CACHE_LIMIT", "1")
    assert found() is not None
    monkeypatch.setenv("BITWRIGHT_CACHE_LIMIT", "much")
    with pytest.raises(BitwrightError, match=r"BW201.*BITWRIGHT_CACHE_LIMIT.*much"):
        found()


def test_a_disk_without_room_is_left_alone_and_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": TEXT.predicted * 64 * 4})
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    said: list[str] = []
    assert opened(tmp_path, on_failure=said.append) is None
    assert len(said) == 1 and "are free" in said[0]


def fill(model: LlamaForCausalLM, cache: LogitCache | None) -> CachedLogits:
    source = CachedLogits(lambda: model, TEXT, cache)
    for numbers in TEXT.batches(2):
        source(numbers)
    return source


def test_what_is_written_is_no_more_than_was_announced(model: LlamaForCausalLM, tmp_path: Path) -> None:
    cache = opened(tmp_path, limit=SIZE)
    fill(model, cache)
    assert cache is not None
    assert TEXT.predicted * 64 * 4 < sum(file.stat().st_size for file in cache.directory.iterdir()) <= SIZE


@pytest.mark.parametrize(("order", "left"), [("abcd", "cd"), ("abac", "ac")])
def test_the_longest_unused_entries_make_room(model: LlamaForCausalLM, tmp_path: Path, order: str, left: str) -> None:
    """Room for two texts and a half; one that is opened again is the newest again."""
    directories: dict[str, Path] = {}
    for age, name in enumerate(order):
        cache = opened(tmp_path, model=name, limit=5 * SIZE // 2)
        assert cache is not None
        fill(model, cache)
        directories[name] = cache.directory
        os.utime(cache.directory, (1000 + age, 1000 + age))
        del cache
    assert {name for name, directory in directories.items() if directory.exists()} == set(left)


def test_what_this_process_reads_is_never_removed(model: LlamaForCausalLM, tmp_path: Path) -> None:
    first = opened(tmp_path, limit=SIZE)
    fill(model, first)
    said: list[str] = []
    assert opened(tmp_path, model="n", limit=SIZE, on_failure=said.append) is None
    assert len(said) == 1 and "in use" in said[0]
    again = CachedLogits(refuse, TEXT, first)
    for numbers in TEXT.batches(2):
        again(numbers)
    del again, first
    assert opened(tmp_path, model="n", limit=SIZE) is not None


def test_a_disk_that_fills_up_is_told_once_and_given_back(
    model: LlamaForCausalLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    cache = opened(tmp_path)
    assert cache is not None
    source = CachedLogits(lambda: model, TEXT, cache, on_failure=said.append)
    source([0, 1])
    assert len(list(cache.directory.iterdir())) == 2

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        expected = source([2, 3])
    assert torch.equal(source([2, 3]), expected) and source.computed == 6
    assert len(said) == 1 and "No space left" in said[0]
    assert not cache.directory.exists()


def test_threads_and_instructions_change_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 77)
        threads = opened(tmp_path)
    monkeypatch.setattr(reference_cache.native_library, "instruction_set", lambda: "another")
    instructions = opened(tmp_path)
    assert first is not None and threads is not None and instructions is not None
    assert len({first.directory, threads.directory, instructions.directory}) == 3


def test_a_cache_that_cannot_be_written_is_done_without(model: LlamaForCausalLM, tmp_path: Path) -> None:
    said: list[str] = []
    (tmp_path / "file").write_text("in the way")
    cache = LogitCache(tmp_path / "file" / "below")
    source = CachedLogits(lambda: model, TEXT, cache, on_failure=said.append)
    first = source([0, 1])
    assert torch.equal(source([0, 1]), first) and source.computed == 4
    assert len(said) == 1 and "not kept" in said[0]
    assert opened(tmp_path / "file") is None
