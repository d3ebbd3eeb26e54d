"""The demo: everything once, on a small part of the text."""

from __future__ import annotations

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
from bitwright.evaluation import comparison
from bitwright.models.embedded_model import read_probes


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Little text, few questions, short stories."""
    monkeypatch.setattr(module, "TEXT_TOKENS", 2048)
    monkeypatch.setattr(module, "STORY_TOKENS", 16)
    monkeypatch.setattr(comparison, "read_probes", lambda: read_probes()[::40])


@pytest.mark.usefixtures("short")
def test_the_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-o", str(tmp_path / "demo")]) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: line for line in out.splitlines() if "MB" in line and "bits" not in line}
    assert list(rows) == [*module.DEMO_SCHEMES, "bf16"]
    assert all(out.count(f"o {scheme}") == 1 for scheme in module.DEMO_SCHEMES)
    assert "bf16      " in out and "| w4g128" in out
    assert (tmp_path / "demo" / "demo.png").read_bytes().startswith(b"\x89PNG")
    assert f"bitwright generate {tmp_path / 'demo' / 'w4g128'}" in out


@pytest.mark.usefixtures("short")
def test_fewer_bits_are_smaller_and_worse(tmp_path: Path) -> None:
    result = bitwright.demo(tmp_path / "demo")
    rows = result.comparison.rows[:-1]
    assert [row.name for row in rows] == list(module.DEMO_SCHEMES)
    assert [row.size_bytes for row in rows] == sorted((row.size_bytes for row in rows), reverse=True)
    divergences = [row.kl_mean for row in rows]
    assert None not in divergences and divergences == sorted(divergences)  # type: ignore[type-var]
    assert json.loads(json.dumps(result.to_dict()))["comparison"]["rows"][0]["name"] == "w8g128"


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
