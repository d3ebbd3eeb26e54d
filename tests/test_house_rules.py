"""The rules of the house hold, and each of them can fail."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from tests.house_rules import LONGER, OPTIONAL_IMPORTS, RULES, WITHOUT_SUGGESTION, Rule, machine_paths, violations

ROOT = Path(__file__).resolve().parents[1]
NAMES = [rule.__name__ for rule in RULES]

# Rule, file, text: each breaks exactly that rule and must be reported, at that line where the rule knows lines.
BROKEN: list[tuple[str, str, str]] = [
    ("layering", "src/bitwright/core/grid.py", "from bitwright.models import blocks\n"),
    ("layering", "src/bitwright/formats/table.py", "import bitwright.kernels.table\n"),
    ("layering", "src/bitwright/engine/step.py", "from ..quantization import run\n"),
    ("layering", "src/bitwright/models/hf.py", "from bitwright import quantize\n"),
    ("layering", "src/bitwright/unheard/of.py", ""),
    ("file_size", "src/bitwright/core/long.py", "x = 1\n" * 401),
    ("file_size", "tests/test_long.py", "x = 1\n" * 401),
    ("function_size", "src/bitwright/core/long.py", "def f():\n" + "    x = 1\n" * 50),
    ("exports", "src/bitwright/core/a.py", "x = 1\n"),
    ("exports", "src/bitwright/core/a.py", "__all__ = ['missing']\n"),
    ("exports", "src/bitwright/core/a.py", "__all__: list[str] = []\ndef public(): ...\n"),
    ("exports", "src/bitwright/core/a.py", "__all__ = ['a', 'a']\na = 1\n"),
    ("environment", "src/bitwright/cli/app.py", "import os\nos.environ['X']\n"),
    ("environment", "src/bitwright/cli/app.py", "from os import getenv\n"),
    ("lazy_imports", "src/bitwright/core/a.py", "def f():\n    import json\n"),
    ("banned_calls", "src/bitwright/core/a.py", "import pickle\n"),
    ("banned_calls", "src/bitwright/core/a.py", "from marshal import loads\n"),
    ("banned_calls", "src/bitwright/core/a.py", "eval('1')\n"),
    ("banned_calls", "src/bitwright/core/a.py", "exec('1')\n"),
    ("banned_calls", "src/bitwright/core/a.py", "import subprocess\nsubprocess.run('ls', shell=True)\n"),
    ("banned_calls", "src/bitwright/core/a.py", "import torch\ntorch.load('x')\n"),
    ("banned_calls", "src/bitwright/core/a.py", "import torch\ntorch.load('x', weights_only=False)\n"),
    ("banned_calls", "src/bitwright/core/a.py", "import yaml\nyaml.load('x')\n"),
    ("banned_calls", "src/bitwright/core/a.py", "import os\nos.system('ls')\n"),
    ("banned_calls", "src/bitwright/models/a.py", "auto.from_pretrained('x', trust_remote_code=flag)\n"),
    ("printing", "src/bitwright/core/a.py", "print('x')\n"),
    ("transformers_once", "src/bitwright/models/loading.py", "from transformers import AutoConfig\n"),
    ("transformers_once", "src/bitwright/models/hf.py", "import compressed_tensors\n"),
    ("storage_only", "src/bitwright/cli/a.py", "Path('x').write_text('y')\n"),
    ("storage_only", "src/bitwright/cli/a.py", "open('x', 'w')\n"),
    ("storage_only", "src/bitwright/cli/a.py", "Path('x').open(mode='ab')\n"),
    ("storage_only", "src/bitwright/cli/a.py", "import os\nos.open('x', os.O_WRONLY | os.O_CREAT)\n"),
    ("storage_only", "src/bitwright/cli/a.py", "import shutil\nshutil.rmtree('x')\n"),
    ("storage_only", "src/bitwright/cli/a.py", "import torch\ntorch.save({}, 'x')\n"),
    ("module_names", "src/bitwright/core/grid_utils.py", ""),
    ("module_names", "tests/helpers/a.py", ""),
    ("suggestions", "src/bitwright/core/a.py", "raise BitwrightError('BW201', 'x')\n"),
    ("suggestions", "src/bitwright/core/a.py", "raise errors.ArgumentError('BW201', 'x', why='y', suggestion='')\n"),
    ("machine_paths", "src/bitwright/core/a.py", "x = '/wo" + "rk/main'\n"),
]
# What the rules must leave alone.
SOUND: list[tuple[str, str]] = [
    (
        "src/bitwright/engine/a.py",
        "__all__: list[str] = []\nfrom bitwright import __version__\nimport bitwright.models\n",
    ),
    ("src/bitwright/core/a.py", "__all__: list[str] = []\nx = ArgumentError('BW201', 'x', suggestion=f'{1}')\n"),
    ("src/bitwright/cli/a.py", "__all__ = ['f']\ndef f():\n    import json\n    print('x', model.eval())\n"),
    ("src/bitwright/formats/a.py", "__all__: list[str] = []\nopen('x', 'rb')\nimport os\nos.open('x', os.O_RDONLY)\n"),
    ("src/bitwright/core/a.py", "import torch\n__all__: list[str] = []\ntorch.load('x', weights_only=True)\n"),
    (
        "src/bitwright/core/a.py",
        "import io, torch\n__all__: list[str] = []\ntorch.save({}, x := io.BytesIO())\n",
    ),
]


@pytest.mark.parametrize("rule", RULES, ids=NAMES)
def test_the_house_keeps_the_rule(rule: Rule) -> None:
    found = violations(ROOT, rule)
    assert not found, f"{rule.__doc__}\n" + "\n".join(found)


@pytest.mark.parametrize(("name", "path", "text"), BROKEN, ids=[f"{name}-{i}" for i, (name, _, _) in enumerate(BROKEN)])
def test_a_broken_rule_is_reported(tmp_path: Path, name: str, path: str, text: str) -> None:
    _write(tmp_path, path, text)
    found = violations(tmp_path, RULES[NAMES.index(name)])
    assert found
    assert all(line.startswith(path) for line in found)


def test_every_rule_has_a_file_that_breaks_it() -> None:
    assert {name for name, _, _ in BROKEN} == set(NAMES)


@pytest.mark.parametrize(("path", "text"), SOUND)
def test_sound_files_are_left_alone(tmp_path: Path, path: str, text: str) -> None:
    _write(tmp_path, path, text)
    assert [line for rule in RULES for line in violations(tmp_path, rule)] == []


def _write(root: Path, path: str, text: str) -> None:
    (root / path).parent.mkdir(parents=True)
    (root / path).write_text(text, encoding="utf-8")


def test_exceptions_name_what_exists_and_why() -> None:
    optional = {f"src/bitwright/{path}": reason for path, reason in OPTIONAL_IMPORTS.items()}
    for path, reason in (LONGER | optional | WITHOUT_SUGGESTION).items():
        assert (ROOT / path.split("::")[0]).is_file(), f"{path} is an exception but does not exist"
        assert len(reason) > 10, f"{path}: an exception needs a reason"


def pins(requirements: list[str]) -> list[str]:
    return [text for text in requirements if "==" in text]


def test_only_the_lock_pins_versions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = [project["build-system"]["requires"], project["project"]["dependencies"]]
    groups += project["project"]["optional-dependencies"].values()
    assert [pin for group in groups for pin in pins(group)] == []
    assert pins(["torch>=2.6", "numpy==2.0"]) == ["numpy==2.0"]


def test_the_lock_pins_everything() -> None:
    lines = (ROOT / "requirements-dev.lock").read_text(encoding="utf-8").splitlines()
    packages = [line for line in lines if line and not line.startswith("#")]
    assert len(packages) > 20
    assert [line for line in packages if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []


def test_pyproject_is_the_only_configuration_file() -> None:
    others = "setup.py setup.cfg pytest.ini tox.ini mypy.ini .mypy.ini ruff.toml .ruff.toml .coveragerc".split()
    assert [name for name in others if (ROOT / name).exists()] == []


def test_documents_name_no_machine(tmp_path: Path) -> None:
    paths = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), ROOT / "Makefile", ROOT / ".ci" / "run"]
    assert len(paths) > 4
    for path in paths:
        text = path.read_text(encoding="utf-8")
        _write(tmp_path / path.name, "src/text.py", text)
        assert violations(tmp_path / path.name, machine_paths) == [], path
