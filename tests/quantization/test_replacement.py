"""Overwriting a finished checkpoint: the old one is whole until the new one is, whatever happens in between."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import INDEX, WORK_DIRECTORY, WORK_JOURNAL, open_checkpoint
from bitwright.formats.checksums import CHECKSUMS, verify_files
from bitwright.models.loading import load
from bitwright.quantization.api import quantize
from bitwright.quantization.card import CARD_FILE
from bitwright.quantization.events import Event, Stopped
from tests.quantization.interruption import Failing, States, read_tree, restore
from tests.quantization.tiny import TEXT, Plain, digests, save_model

Run = Callable[[], object]
MINE = {"notes.txt": b"mine", "model-backup.safetensors": b"mine too", "tokenizer.model": b"from elsewhere"}


@pytest.fixture
def place(tmp_path: Path) -> tuple[Path, Run, dict[str, bytes | None], dict[str, str]]:
    """An output with a finished checkpoint and somebody's files, the run that replaces it, and what that will give."""
    (tmp_path / "outputs").mkdir()
    output = tmp_path / "outputs/out"
    model = Plain(width=16, blocks=2)
    quantize(Plain(width=16, blocks=3), output, scheme="w8")  # more shards, of other names
    for name, data in MINE.items():
        (output / name).write_bytes(data)
    old = read_tree(output)

    def run() -> object:
        return quantize(model, output, scheme="w4g8-asym", overwrite=True)

    run()
    return output, run, old, digests(output)


def assert_old_or_unfinished(output: Path, old: dict[str, str], expected: dict[str, str]) -> str:
    """Either checkpoint is whole, or none can be opened."""
    found = {name: value for name, value in digests(output).items() if not name.startswith(WORK_DIRECTORY)}
    if (output / INDEX).exists():
        is_new = found[INDEX] == expected[INDEX]
        wanted = expected if is_new else old
        assert {name: found.get(name) for name in wanted} == wanted
        open_checkpoint(output)
        assert verify_files(output)
        return "new" if is_new else "old"
    with pytest.raises(BitwrightError, match="BW308"):
        open_checkpoint(output)
    return "neither"


def test_at_every_moment_one_checkpoint_is_whole_or_the_run_goes_on(
    place: tuple[Path, Run, dict[str, bytes | None], dict[str, str]],
) -> None:
    output, run, old, expected = place
    restore(output, old)
    before = digests(output)
    states = States(output)
    with states.collect():
        run()
    assert digests(output) == expected and len(states.killed) > 60
    seen = []
    for number, tree in enumerate(states.killed.values()):
        restore(output, tree)
        seen.append(assert_old_or_unfinished(output, before, expected))
        run()
        assert digests(output) == expected, (number, sorted(tree))
    shares = {kind: seen.count(kind) for kind in ("old", "neither", "new")}
    assert shares["old"] > shares["neither"] > 3 and shares["new"], shares


@pytest.mark.parametrize(("code", "lasting"), [(errno.EIO, False), (errno.ENOSPC, True)])
def test_a_failing_call_never_costs_the_old_checkpoint_before_the_new_one_is_there(
    place: tuple[Path, Run, dict[str, bytes | None], dict[str, str]], code: int, lasting: bool
) -> None:
    output, run, old, expected = place
    restore(output, old)
    before = digests(output)
    for number in range(1, 1000):
        restore(output, old)
        failing = Failing(number, code, lasting=lasting)
        with failing.inject():
            try:
                run()
            except BitwrightError as error:
                assert error.code == "BW501", (number, failing.failed)
        if not failing.failed:
            break
        assert_old_or_unfinished(output, before, expected)
        run()
        found = digests(output)
        found.pop(f"{WORK_DIRECTORY}/lock", None)  # one that could not be removed stays, and locks nothing
        assert found == expected, (number, failing.failed)
    assert number > 80


def stopped(output: Path, units: int, **arguments: object) -> None:
    asked = iter([False] * (units - 1) + [True])
    with pytest.raises(Stopped):
        quantize(output.parent / "model", output, should_stop=lambda: next(asked), **arguments)  # type: ignore[arg-type]


def test_an_interrupted_replacement_is_resumed_refused_or_discarded(tmp_path: Path) -> None:
    """With calibration and a passed-over old checkpoint that runs all the while."""
    model, output = tmp_path / "model", tmp_path / "out"
    save_model(model, "llama", num_hidden_layers=3)
    (tmp_path / "text.txt").write_text(TEXT)
    calibrated = {"calibration": tmp_path / "text.txt", "samples": 2, "seqlen": 8, "scheme": "w4g32"}
    quantize(model, output, scheme="w8")
    quantize(model, tmp_path / "fresh", **calibrated)  # type: ignore[arg-type]
    logits = load(output)(torch.arange(5)[None]).logits
    stopped(output, 3, **calibrated, overwrite=True)
    assert torch.equal(load(output)(torch.arange(5)[None]).logits, logits)
    with pytest.raises(BitwrightError, match="BW207"):
        quantize(model, output, scheme="w3g32", overwrite=True)
    events: list[Event] = []
    quantize(model, output, **calibrated, overwrite=True, on_event=events.append)  # type: ignore[arg-type]
    assert [event.data["done"] for event in events if event.kind == "resume"] == [3]
    assert digests(output) == digests(tmp_path / "fresh")
    stopped(output, 2, scheme="w8", overwrite=True)
    quantize(model, output, scheme="w2g32", overwrite=True, restart=True)
    quantize(model, tmp_path / "other", scheme="w2g32")
    assert digests(output) == digests(tmp_path / "other")


def test_a_journal_of_a_run_that_ended_is_no_replacement(tmp_path: Path) -> None:
    """Killed before its last call, a run has written everything; other settings may then replace that."""
    model, output = Plain(width=16, blocks=2), tmp_path / "out"
    states = States(output)
    with states.collect():
        quantize(model, output, scheme="w8")
    journal = f"{WORK_DIRECTORY}/{WORK_JOURNAL}"
    restore(output, next(tree for tree in states.killed.values() if INDEX in tree and journal in tree))
    quantize(model, output, scheme="w4g8", overwrite=True)
    quantize(model, tmp_path / "fresh", scheme="w4g8")
    assert digests(output) == digests(tmp_path / "fresh")


@pytest.mark.parametrize("name", [CARD_FILE, "config.json", "LICENSE"])
def test_a_file_that_somebody_else_wrote_is_not_overwritten(tmp_path: Path, name: str) -> None:
    model, output = tmp_path / "model", tmp_path / "out"
    save_model(model, "llama")
    quantize(model, output, scheme="w8")
    (model / "LICENSE").write_text("of the model")
    if name == "config.json":  # a list of files that does not have it
        listed = (output / CHECKSUMS).read_text().splitlines()
        (output / CHECKSUMS).write_text("\n".join(line for line in listed if '"config.json"' not in line))
    else:
        (output / name).write_text("Written by somebody.")
    before = digests(output)
    with pytest.raises(BitwrightError, match=f"did not write: {name}") as caught:
        quantize(model, output, scheme="w4g32", overwrite=True)
    assert caught.value.code == "BW203" and digests(output) == before
    (output / name).unlink()
    quantize(model, output, scheme="w4g32", overwrite=True)
    assert (output / "LICENSE").read_text() == "of the model"


def test_a_licence_of_somebody_stays_where_the_model_has_none(tmp_path: Path) -> None:
    model, output = Plain(width=16, blocks=2), tmp_path / "out"
    quantize(model, output, scheme="w8")
    (output / "LICENSE").write_text("Written by somebody.")
    quantize(model, output, scheme="w4g8", overwrite=True)
    assert (output / "LICENSE").read_text() == "Written by somebody."


@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"restart": True}])
def test_somebodys_directory_with_a_work_directory_is_theirs(tmp_path: Path, flags: dict[str, bool]) -> None:
    output = tmp_path / "theirs"
    save_model(output, "llama")
    (output / WORK_DIRECTORY).mkdir()
    (output / WORK_DIRECTORY / "settings.json").write_text("{}")
    (output / CARD_FILE).write_text("My model.")
    before = digests(output)
    open_checkpoint(output)
    for source in (Plain(width=16, blocks=2), output):
        with pytest.raises(BitwrightError) as caught:
            quantize(source, output, scheme="w8", **flags)  # type: ignore[arg-type]
        assert caught.value.code == "BW203" and digests(output) == before
