"""Killed, cut off, or failing at any call: the same command again gives the same bytes."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import INDEX, open_checkpoint
from bitwright.quantization import api
from bitwright.quantization.api import quantize
from bitwright.quantization.sources import DiskSource
from tests.quantization.interruption import Failing, States, restore
from tests.quantization.tiny import TEXT, Plain, digests, save_model

Run = Callable[[], object]
KINDS = pytest.mark.parametrize("kind", ["data-free", "calibrated"])
SLOW_IF_CALIBRATED = pytest.mark.parametrize("kind", ["data-free", pytest.param("calibrated", marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interruption")
    save_model(folder / "model", "qwen2", hidden_size=16, intermediate_size=32, num_attention_heads=2)
    (folder / "text.txt").write_text(TEXT)
    (folder / "outputs").mkdir()
    return folder


@pytest.fixture
def run(request: pytest.FixtureRequest, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A run into ``workplace/outputs/out``: of a module in memory, or from disk with calibration and a head."""
    output = workplace / "outputs" / "out"
    if request.node.callspec.params["kind"] == "data-free":
        model = Plain(width=16, blocks=2)
        yield lambda: quantize(model, output, scheme="w4g8-asym")
    else:
        source = DiskSource(workplace / "model")  # building the model anew would take most of the time
        monkeypatch.setattr(api, "DiskSource", lambda directory: source)
        yield lambda: quantize(
            workplace / "model",
            output,
            scheme="w3g16",
            calibration=workplace / "text.txt",
            samples=2,
            seqlen=4,
            overrides=["lm_head=w8"],
        )
    restore(output, {})


def finished(run: Run, output: Path) -> dict[str, str]:
    """What an uninterrupted run writes."""
    restore(output, {})
    run()
    expected = digests(output)
    assert INDEX in expected
    assert not [name for name in expected if "tmp" in name or name.startswith(".")]
    return expected


def assert_never_looks_whole(output: Path, expected: dict[str, str]) -> None:
    """An index is there only if every weight and configuration file is, as it should be."""
    if not (output / INDEX).exists():
        with pytest.raises(BitwrightError) as caught:
            open_checkpoint(output)
        assert caught.value.code in ("BW301", "BW308")
        return
    found = digests(output)
    assert {name: found.get(name) for name in expected} == expected
    open_checkpoint(output)


@KINDS
def test_a_kill_or_power_cut_at_any_call_is_resumed_to_the_same_bytes(run: Run, workplace: Path, kind: str) -> None:
    output = workplace / "outputs" / "out"
    expected = finished(run, output)
    restore(output, {})
    states = States(output)
    with states.collect():
        run()
    assert digests(output) == expected
    left = {**states.cut, **states.killed}
    assert states.calls > 100 and len(left) > 60
    told_finished = 0
    for number, tree in enumerate(left.values()):
        restore(output, tree)
        assert_never_looks_whole(output, expected)
        try:
            run()
        except BitwrightError as error:
            # The kill came after the end, while the last leftovers were being removed.
            assert error.code == "BW203" and INDEX in tree and ".bitwright/journal.jsonl" not in tree, number
            told_finished += 1
        assert digests(output) == expected, f"resumed from state {number} of {len(left)}: {sorted(tree)}"
    assert told_finished <= 2  # the work directory when it is empty, and when it is gone


def sweep(run: Run, output: Path, code: int, *, lasting: bool, step: int = 1) -> None:
    """Make each changing call fail in turn, until a run has none that fails."""
    expected = finished(run, output)
    number = 0
    while True:
        number += step
        restore(output, {})
        failing = Failing(number, code, lasting=lasting)
        with failing.inject():
            try:
                run()
            except BitwrightError as error:
                assert error.code == "BW501", (number, failing.failed)
                assert error.where and error.suggestion
                clean = False
            else:
                clean = True
        if not failing.failed:
            break
        where = f"call {number}, {failing.failed}"
        if clean:
            found = digests(output)
            if failing.failed == "unlink":  # a lock file that cannot be removed stays, and locks nothing
                found.pop(".bitwright/lock", None)
            assert found == expected, where
            continue
        if output.exists():
            assert failing.failed in ("unlink", "remove") or not list(output.rglob(".*.tmp")), where
            assert_never_looks_whole(output, expected)
        try:
            run()
        except BitwrightError as error:
            assert error.code == "BW203" and not (output / ".bitwright/journal.jsonl").exists(), where
        found = digests(output)
        found.pop(".bitwright/lock", None)
        assert found == expected, where
    assert number > 80


@SLOW_IF_CALIBRATED
def test_a_failing_call_leaves_a_clean_error_and_a_resumable_state(run: Run, workplace: Path, kind: str) -> None:
    sweep(run, workplace / "outputs" / "out", errno.EIO, lasting=False)


@SLOW_IF_CALIBRATED
def test_a_full_disk_leaves_a_clean_error_and_a_resumable_state(run: Run, workplace: Path, kind: str) -> None:
    sweep(run, workplace / "outputs" / "out", errno.ENOSPC, lasting=True)


@pytest.mark.parametrize("kind", ["calibrated"])
def test_some_failing_calls_of_a_calibrated_run(run: Run, workplace: Path, kind: str) -> None:
    """Every seventh; all of them are tried where time does not matter."""
    sweep(run, workplace / "outputs" / "out", errno.EIO, lasting=False, step=7)
