"""Every example runs, prints something, and is short."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example(
    path: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(path), run_name="__main__")
    assert capsys.readouterr().out.strip()
    assert list(tmp_path.iterdir()) == [], "an example leaves nothing behind"


def test_examples_are_numbered_and_short() -> None:
    assert len(EXAMPLES) >= 5
    for number, path in enumerate(EXAMPLES, 1):
        assert path.name.startswith(f"{number:02d}_")
        assert len(path.read_text(encoding="utf-8").splitlines()) < 40, path.name
