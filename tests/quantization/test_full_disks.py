"""A disk that fills up at any call: the path, the bytes and the next step are told, and the same call ends well later.

Of ``quantize`` itself that is shown in test_interruption.py, of the caches on disk where those are tested.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from bitwright.core.errors import BitwrightError
from bitwright.formats.checkpoint import open_checkpoint
from bitwright.formats.checksums import verify_files
from bitwright.models.kv_parameters import PARAMETERS_FILE
from bitwright.models.loading import load
from bitwright.models.saving import save
from bitwright.quantization.api import quantize
from bitwright.quantization.kv_calibration import WORK, calibrate
from tests.quantization.interruption import Failing, read_tree, restore
from tests.quantization.tiny import TEXT, save_model

SOME = pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.slow), 13])  # of the calls, which are many


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "float", "qwen2", hidden_size=16, intermediate_size=32, num_attention_heads=2)
    (folder / "text").write_text(TEXT)
    quantize(folder / "float", folder / "w4", scheme="w4g16", format="compressed-tensors")
    return folder


def sweep(run: Callable[[], object], place: Path, *, step: int) -> int:
    """Let the disk be full from each changing call on, then make room and run again; how many calls there are."""
    before = read_tree(place)
    run()
    expected = read_tree(place)
    number = 0
    while True:
        number += step
        restore(place, before)
        failing, has_ended = Failing(number, errno.ENOSPC, lasting=True), False
        with failing.inject():
            try:
                run()
                has_ended = True
            except BitwrightError as error:
                assert error.code == "BW501", (number, failing.failed)
                assert Path(error.where).is_relative_to(place.parent), (number, error.where)
                assert "are free" in error.why, (number, error.why)
                assert "GB or more" in error.suggestion
        if not failing.failed:
            assert read_tree(place) == expected
            return number
        if not has_ended:
            run()
        assert read_tree(place) == expected, (number, failing.failed)


@SOME
def test_saving_a_model(model: Path, tmp_path: Path, step: int) -> None:
    loaded, place = load(model / "w4"), tmp_path / "saved"

    assert sweep(lambda: save(loaded, place), place, step=step) > 20
    assert verify_files(place) and load(place) is not None


def test_what_a_failed_saving_leaves(model: Path, tmp_path: Path) -> None:
    """Nothing, whichever call fails, so that the next one is not told that there is a model."""
    loaded, place = load(model / "w4"), tmp_path / "saved"
    for number in itertools.count(1):
        failing = Failing(number, errno.ENOSPC, lasting=True)
        with failing.inject(), contextlib.suppress(BitwrightError):
            save(loaded, place)
        if not failing.failed:
            break
        assert not place.exists() or list(place.iterdir()) == [], (number, failing.failed)
    assert number > 20 and verify_files(place)


@SOME
def test_calibrating_a_cache(model: Path, tmp_path: Path, step: int) -> None:
    place = tmp_path / "statistics"
    place.mkdir()

    def run() -> None:
        calibrate(model / "float", dataset=model / "text", samples=8, seqlen=8, output=place)

    assert sweep(run, place, step=step) > 40
    assert (place / PARAMETERS_FILE).exists() and not (place / WORK).exists()


@SOME
def test_scales_in_a_checkpoint(model: Path, tmp_path: Path, step: int) -> None:
    place = Path(shutil.copytree(model / "w4", tmp_path / "w4"))

    def run() -> None:
        calibrate(place, dataset=model / "text", samples=8, seqlen=8, kv_cache_scheme="fp8")

    assert sweep(run, place, step=step) > 20
    assert verify_files(place) and open_checkpoint(place)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a system without /dev/full")
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_printing(unbuffered: str) -> None:
    """What is still in a buffer when the command ends is printed before its exit status is settled."""
    program = "import sys; from bitwright.cli import main; sys.exit(main(['explain', 'BW501']))"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    assert done.returncode == 5
    assert done.stderr.startswith("error[BW501]: cannot write: No space left on device")
    assert "standard output" in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.slow
def test_a_disk_that_is_really_full(model: Path) -> None:
    """In a file system of its own in memory, where the system lets a test make one."""
    script = """
set -e
mount -t tmpfs -o size=400k tmpfs "$1"
cp -r "$2" "$1/model"
status=0
"$3" -c 'import sys; from bitwright.cli import main; sys.exit(main(sys.argv[1:]))' $4 "$1/model" -o "$1/out" \
    --scheme w4g16 --no-check 2> "$1.said" || status=$?
umount "$1"
exit $status
"""
    place = model / "mounted"
    place.mkdir()
    probe = ["unshare", "--user", "--map-root-user", "--mount"]
    if shutil.which("unshare") is None or subprocess.run([*probe, "true"], capture_output=True).returncode:
        pytest.skip("no file systems can be mounted here")
    arguments = [str(place), str(model / "float"), sys.executable, "quantize"]
    done = subprocess.run([*probe, "sh", "-c", script, "sh", *arguments], capture_output=True, text=True)
    said = Path(f"{place}.said").read_text()
    assert done.returncode == 5, (done.stderr, said)
    assert said.startswith("error[BW501]: ") and str(place) in said and "try: free" in said
