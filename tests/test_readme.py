"""README.md and the generated documents say what is true: their commands run and print what is shown."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from bitwright.evaluation import comparison
from bitwright.models.embedded_model import read_probes
from docs.generate import DOCUMENTS, STATUS, Block, mask, refresh, run_block, runnable_blocks

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_commands_of_the_readme_run_and_print_what_it_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in runnable_blocks(README) if not block.slow]
    assert len(blocks) >= 3
    for block in blocks:
        assert mask(run_block(block)) == mask(block.body)


@pytest.mark.slow
def test_slow_commands_of_the_readme(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their text may differ between machines (a model writes it); that they run, and what they are, may not.

    For the sake of time, models are asked one probe of ten.
    """
    monkeypatch.setattr(comparison, "read_probes", lambda: read_probes()[::10])
    shown, made = runnable_blocks(README), runnable_blocks(refresh(README))
    assert any(block.slow for block in shown)
    assert [block.commands for block in made] == [block.commands for block in shown]
    lines = ([line for block in blocks for line in block.body.splitlines()] for blocks in (shown, made))
    expected, found = ([line for line in each if line.startswith(STATUS)] for each in lines)
    assert found == expected and len(expected) == 1


def test_a_block_that_lies_is_found() -> None:
    body = "$ bitwright --version\nbitwright 9.9.9 and more\n"
    (block,) = runnable_blocks(f"<!-- runnable -->\n```console\n{body}```\n")
    assert block == Block(("bitwright --version",), body)
    assert mask(run_block(block)) == ["$ bitwright version", "bitwright N"] != mask(body)
    (short,) = runnable_blocks("<!-- runnable: slow head=2 -->\n```console\n$ bitwright --help\n```\n")
    assert short.slow and run_block(short).splitlines()[-1] == "..." and len(run_block(short).splitlines()) == 4
    assert mask(run_block(Block(("bitwright explain BW999",), "")))[-1] == "[exit status N]"
    (cut,) = runnable_blocks("<!-- runnable: head=1 -->\n```console\n$ bitwright explain BW999\n```\n")
    assert mask(run_block(cut))[-2:] == ["...", "[exit status N]"]
    with pytest.raises(RuntimeError, match="only bitwright"):
        run_block(Block(("rm -r .",), ""))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_generated_documents_are_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == DOCUMENTS[name](), "run `make docs`"


def test_the_map_of_the_tree_names_what_exists() -> None:
    tree = README.partition("## The tree")[2].partition("\n## ")[0]
    named = re.findall(r"^([\w./-]+)", tree.partition("```text")[2].partition("```")[0], re.MULTILINE)
    assert len(named) >= 12
    assert [path for path in named if not (ROOT / path).exists()] == []
    packages = {path.name for path in (ROOT / "src" / "bitwright").iterdir() if (path / "__init__.py").exists()}
    assert packages - {Path(path).name for path in named} == set()


def test_make_targets_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for name in ("README.md", "CONTRIBUTING.md"):
        used = set(re.findall(r"`make (\w+)", (ROOT / name).read_text(encoding="utf-8")))
        assert used <= targets, name


def test_the_version_is_in_the_changelog() -> None:
    import bitwright

    assert f"## {bitwright.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["project"]["dynamic"] == ["version"]


def test_links_inside_the_documents_lead_somewhere() -> None:
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            assert (document.parent / target).exists(), f"{document.name}: {target}"
