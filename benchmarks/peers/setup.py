"""Makes an environment for each peer, away from the repository and from bitwright's own.

    python -m benchmarks.peers.setup --work-dir DIR [NAME ...]

torch is installed first and held at one release, so that every peer computes with the same one: a peer that asks for
another is installed against that constraint, or fails here and is missing from the tables.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from collections.abc import Callable, Mapping
from pathlib import Path

__all__ = ["TORCH", "install_peers"]

REQUIREMENTS = Path(__file__).resolve().parent / "requirements"
TORCH = "torch==2.13.0"


def install(directory: Path, steps: list[list[str]], environment: Mapping[str, str]) -> bool:
    """Whether the environment ``directory`` is complete; ``steps`` are what pip installs, one after the other."""
    if (directory / "complete").is_file():
        return True
    venv.create(directory, with_pip=True, clear=directory.exists())
    constraints = directory / "constraints.txt"
    constraints.write_text(f"{TORCH}\n")
    pip = [str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    for step in steps:
        command = [*pip, "--constraint", str(constraints), *step]
        if subprocess.run(command, check=False, env={**os.environ, **environment}).returncode:
            return False
    (directory / "complete").write_text("")
    return True


def install_peers(
    description: str | None,
    requirements: Path,
    steps: Callable[[str, list[str]], list[list[str]]],
    environment: Mapping[str, str],
) -> None:
    """Install what was asked for of the files in ``requirements``; the exit status says whether all of it is there.

    ``steps`` makes what pip installs from a peer's name and the arguments that stand for its file.
    """
    names = tuple(sorted(path.stem for path in requirements.glob("*.txt")))
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; all unless given")
    parser.add_argument("--work-dir", type=Path, required=True)
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(names))
    if unknown:
        parser.error(f"unknown peer {unknown[0]}")
    work: Path = arguments.work_dir
    work.mkdir(parents=True, exist_ok=True)
    chosen = arguments.names or names
    done = {
        name: install(work / name, steps(name, ["-r", str(requirements / f"{name}.txt")]), environment)
        for name in chosen
    }
    for name, is_there in done.items():
        print(f"{name}: {'ready' if is_there else 'failed'}")
    sys.exit(0 if all(done.values()) else 1)


if __name__ == "__main__":
    install_peers(__doc__, REQUIREMENTS, lambda _, file: [[TORCH], ["setuptools", "wheel", *file]], {})
