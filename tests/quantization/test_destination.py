"""Which outputs are refused, and that nothing of anybody else's is ever touched."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import INDEX, WORK_DIRECTORY
from bitwright.quantization.api import quantize
from bitwright.quantization.events import Event
from tests.quantization.tiny import Plain, digests, rewrite_tensors, save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("destination")
    save_model(folder, "llama")
    return folder


def refused(model: Path | torch.nn.Module, output: Path, **arguments: object) -> BitwrightError:
    with pytest.raises(BitwrightError) as caught:
        quantize(model, output, scheme="w4g32", **arguments)  # type: ignore[arg-type]
    return caught.value


def test_a_new_nested_or_empty_directory_is_written(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "new", tmp_path / "a/b/c"):
        quantize(Plain(width=32, blocks=1), output, scheme="w4g32")
        assert (output / INDEX).is_file() and not (output / WORK_DIRECTORY).exists()


def test_an_output_below_a_file_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("mine")
    for output in (tmp_path / "short.txt/x", tmp_path / "short.txt/x/y"):
        error = refused(Plain(width=32, blocks=1), output)
        assert error.code == "BW203" and error.exit_status == 2
        assert error.what.endswith("short.txt is a file") and error.suggestion
    assert (tmp_path / "short.txt").read_text() == "mine"


def test_a_finished_checkpoint_is_kept_unless_it_may_be_overwritten(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    quantize(model, output, scheme="w4g32")
    before = digests(output)
    for flags in ({}, {"restart": True}):
        error = refused(model, output, **flags)
        assert error.code == "BW203" and error.exit_status == 2
        assert "finished" in error.what and "--overwrite" in error.suggestion
    assert digests(output) == before
    quantize(model, output, scheme="w8", overrides=["lm_head=w8"], overwrite=True)
    quantize(model, tmp_path / "fresh", scheme="w8", overrides=["lm_head=w8"])
    assert digests(output) == digests(tmp_path / "fresh")


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"restart": True}, {"overwrite": True, "restart": True}])
def test_a_directory_of_other_files_is_refused_whatever_the_flags(
    model: Path, tmp_path: Path, flags: dict[str, bool]
) -> None:
    output = tmp_path / "photos"
    (output / "summer").mkdir(parents=True)
    (output / "summer/beach.jpg").write_bytes(b"precious")
    before = digests(output)
    error = refused(model, output, **flags)
    assert error.code == "BW203" and "not a checkpoint of bitwright" in error.what
    assert digests(output) == before and not (output / WORK_DIRECTORY).exists()


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"restart": True}])
def test_another_tools_model_is_not_overwritten(model: Path, tmp_path: Path, flags: dict[str, bool]) -> None:
    save_model(tmp_path / "theirs", "qwen2", shard="20KB")
    assert (tmp_path / "theirs" / INDEX).exists()
    before = digests(tmp_path / "theirs")
    assert refused(model, tmp_path / "theirs", **flags).code == "BW203"
    assert digests(tmp_path / "theirs") == before


def test_files_put_beside_our_own_survive_overwriting_and_restarting(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    quantize(model, output, scheme="w4g32")
    notes = {"notes.txt": b"mine", "model-backup.safetensors": b"mine too", "eval/results.json": b"{}", ".env": b"KEY"}
    for name, data in notes.items():
        (output / name).parent.mkdir(exist_ok=True)
        (output / name).write_bytes(data)
    quantize(model, output, scheme="w8", overwrite=True)
    assert {name: (output / name).read_bytes() for name in notes} == notes


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"restart": True}])
def test_the_source_is_never_the_output(tmp_path: Path, flags: dict[str, bool]) -> None:
    source = tmp_path / "model"
    save_model(source, "llama")
    (tmp_path / "link").symlink_to(source)
    before = digests(source)
    for output in (source, tmp_path / "link", source / "sub" / ".."):
        (source / "sub").mkdir(exist_ok=True)
        error = refused(source, output, **flags)
        assert error.code == "BW203" and "source" in error.what
        assert digests(source) == before


def test_a_finished_output_is_never_its_own_source(model: Path, tmp_path: Path) -> None:
    quantize(model, tmp_path / "out", scheme="w4g32")
    before = digests(tmp_path / "out")
    error = refused(tmp_path / "out", tmp_path / "out", overwrite=True)
    assert error.code == "BW203" and digests(tmp_path / "out") == before


def test_the_output_may_lie_inside_the_source(tmp_path: Path) -> None:
    source = tmp_path / "model"
    save_model(source, "llama")
    before = digests(source)
    quantize(source, source / "w4", scheme="w4g32")
    quantize(source, source / "w4", scheme="w4g32", overwrite=True)
    assert {name: value for name, value in digests(source).items() if not name.startswith("w4/")} == before


@pytest.mark.parametrize("kind", ["file", "link to a file", "below a file", "dangling link", "name too long", "null"])
def test_what_cannot_be_a_directory_is_refused_cleanly(model: Path, tmp_path: Path, kind: str) -> None:
    (tmp_path / "file").write_bytes(b"kept")
    (tmp_path / "link to a file").symlink_to(tmp_path / "file")
    (tmp_path / "dangling link").symlink_to(tmp_path / "nowhere")
    output = {"below a file": "file/out", "name too long": "x" * 300, "null": "a\0b"}.get(kind, kind)
    for flags in ({}, {"overwrite": True}):
        error = refused(model, tmp_path / output, **flags)
        assert error.code in ("BW203", "BW501")
    assert (tmp_path / "file").read_bytes() == b"kept"
    assert not (tmp_path / "nowhere").exists()


def test_broken_weights_cost_neither_a_directory_nor_the_old_checkpoint(tmp_path: Path) -> None:
    source = tmp_path / "model"
    save_model(source, "llama")
    quantize(source, tmp_path / "old", scheme="w4g32")
    before = digests(tmp_path / "old")
    broken = torch.zeros(32)
    broken[3], broken[7] = float("nan"), float("inf")
    rewrite_tensors(source, {"model.norm.weight": broken})
    error = refused(source, tmp_path / "new")
    assert error.code == "BW309" and "model.norm.weight (2)" in error.what and error.exit_status == 3
    assert not (tmp_path / "new").exists()
    assert refused(source, tmp_path / "old", overwrite=True).code == "BW309"
    assert digests(tmp_path / "old") == before
    rewrite_tensors(source, {"model.norm.weight": torch.ones(32)})
    quantize(source, tmp_path / "new", scheme="w4g32")  # nothing is left of the refusal


def test_a_disk_too_small_is_told_before_anything_is_lost(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    quantize(model, output, scheme="w4g32")
    before = digests(output)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    error = refused(model, output, overwrite=True)
    assert error.code == "BW501" and str(output) in error.where and "free" in error.suggestion
    assert refused(model, tmp_path / "new").code == "BW501"
    assert digests(output) == before
    monkeypatch.undo()
    quantize(model, tmp_path / "new", scheme="w4g32")


def test_a_run_that_ended_meanwhile_is_not_overwritten(model: Path, tmp_path: Path) -> None:
    """Two runs may look at an empty output together; the second to get the lock looks again."""
    output = tmp_path / "out"
    ran = False

    def other_run(event: Event) -> None:
        nonlocal ran
        if event.kind == "plan" and not ran:
            ran = True
            quantize(model, output, scheme="w8")

    with pytest.raises(BitwrightError, match="BW203"):
        quantize(model, output, scheme="w4g32", on_event=other_run)
    quantize(model, tmp_path / "fresh", scheme="w8")
    assert digests(output) == digests(tmp_path / "fresh")
    assert not (output / WORK_DIRECTORY).exists()


def test_leftovers_of_the_last_moment_do_not_make_a_finished_checkpoint_unfinished(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    quantize(model, output, scheme="w4g32")
    before = digests(output)
    (output / WORK_DIRECTORY).mkdir()
    (output / WORK_DIRECTORY / "lock").write_text("{}")
    with pytest.raises(BitwrightError, match="BW203"):
        quantize(model, output, scheme="w8")
    assert {name: value for name, value in digests(output).items() if not name.startswith(WORK_DIRECTORY)} == before
    quantize(model, output, scheme="w8", overwrite=True)
    assert not (output / WORK_DIRECTORY).exists()


def test_a_companion_that_leads_outside_the_model_is_not_copied(tmp_path: Path) -> None:
    save_model(tmp_path / "model", "llama")
    (tmp_path / "secret").write_text("a key")
    (tmp_path / "model/merges.txt").symlink_to(tmp_path / "secret")
    error = refused(tmp_path / "model", tmp_path / "out")
    assert error.code == "BW310" and "merges.txt" in error.what
    assert not (tmp_path / "out").exists()
