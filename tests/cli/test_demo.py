"""The demo: everything once, on a small part of the text."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

import bitwright
from bitwright.cli import demo as module
from bitwright.cli import main
from bitwright.cli.demo import Demonstration
from bitwright.evaluation import comparison
from bitwright.models.embedded_model import read_probes

pytestmark = pytest.mark.xdist_group("demo")  # one process makes what all of these look at


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Demonstration:
    """The whole demo on little text, with few questions and short stories."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "TEXT_TOKENS", 2048)
        patch.setattr(module, "STORY_TOKENS", 16)
        patch.setattr(comparison, "read_probes", lambda: read_probes()[::40])
        return bitwright.demo(tmp_path_factory.mktemp("demo") / "out")


def test_fewer_bits_are_smaller_and_worse(result: Demonstration) -> None:
    rows = result.comparison.rows[:-1]
    assert [row.name for row in rows] == list(module.DEMO_SCHEMES)
    assert [row.size_bytes for row in rows] == sorted((row.size_bytes for row in rows), reverse=True)
    divergences = [row.kl_mean for row in rows]
    assert None not in divergences and divergences == sorted(divergences)  # type: ignore[type-var]
    assert result.comparison.rows[-1].name == result.comparison.reference == "bf16"


def test_what_is_made(result: Demonstration) -> None:
    assert sorted(path.name for path in result.directory.iterdir()) == sorted([*module.DEMO_SCHEMES, "demo.png"])
    assert (result.directory / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert all(story.startswith(module.PROMPT) and len(story) > 40 for story in result.stories.values())
    for path in result.models.values():
        assert bitwright.inspect(path, verify=True).layers


def test_the_command_shows_all_of_it(
    result: Demonstration, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "demo", lambda output, on_line: result)
    assert main(["demo"]) == 0
    out = capsys.readouterr().out
    table = {line.split()[0] for line in out.splitlines() if " MB " in line}
    assert table == {*module.DEMO_SCHEMES, "bf16"}
    plot = [line for line in out.splitlines() if "|" in line]
    assert all(sum(f"o {scheme}" in line for line in plot) == 1 for scheme in module.DEMO_SCHEMES)
    assert any(line.split() == ["bf16", "|", "w4g128"] for line in plot)
    assert f"bitwright generate {result.models['w4g128']} " in out
    assert main(["demo", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["comparison"]["rows"][0]["name"] == "w8g128"


def test_no_room_for_a_temporary_directory(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def full(prefix: str) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(tmp_path / prefix))

    monkeypatch.setattr(module.tempfile, "mkdtemp", full)
    assert main(("demo",)) == 5
    err = capsys.readouterr().err
    assert err.startswith("error[BW501]: ") and str(tmp_path) in err and "TMPDIR" in err


def test_an_existing_output_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "w8g128").mkdir()
    (tmp_path / "w8g128" / "mine.txt").write_text("x")
    assert main(["demo", "-o", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith("error[BW203]")


@pytest.mark.slow
def test_the_whole_demo_takes_under_a_minute(tmp_path: Path) -> None:
    """In time of the processor, for two cores, since other tests run beside it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    started = os.times()
    wall = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "bitwright", "demo"], capture_output=True, text=True, env=environment)
    ended = os.times()
    assert done.returncode == 0, done.stderr
    seconds = ended.children_user - started.children_user
    print(f"demo: {time.perf_counter() - wall:.0f} s, {seconds:.0f} s of processor time")
    assert seconds < 60
