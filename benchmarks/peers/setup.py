"""Makes an environment for each peer, away from the repository and from bitwright's own.

    python -m benchmarks.peers.setup --work-dir DIR [NAME ...]

torch is installed first and held at one release, so that every peer computes with the same one: a peer that asks for
another is installed against that constraint, or fails here and is missing from the tables.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent / "requirements"
NAMES = tuple(sorted(path.stem for path in REQUIREMENTS.glob("*.txt")))
TORCH = "torch==2.13.0"


def install(name: str, work: Path) -> bool:
    """Whether the environment ``work/name`` is complete."""
    directory = work / name
    if (directory / "complete").is_file():
        return True
    venv.create(directory, with_pip=True, clear=directory.exists())
    constraints = directory / "constraints.txt"
    constraints.write_text(f"{TORCH}\n")
    pip = [str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    steps = [
        [TORCH],
        ["--constraint", str(constraints), "setuptools", "wheel", "-r", str(REQUIREMENTS / f"{name}.txt")],
    ]
    for step in steps:
        if subprocess.run([*pip, *step], check=False).returncode:
            return False
    (directory / "complete").write_text("")
    return True


def main() -> None:
    """Install what was asked for; the exit status says whether all of it is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; all unless given")
    parser.add_argument("--work-dir", type=Path, required=True)
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(NAMES))
    if unknown:
        parser.error(f"unknown peer {unknown[0]}")
    arguments.work_dir.mkdir(parents=True, exist_ok=True)
    done = {name: install(name, arguments.work_dir) for name in arguments.names or NAMES}
    for name, is_there in done.items():
        print(f"{name}: {'ready' if is_there else 'failed'}")
    sys.exit(0 if all(done.values()) else 1)


if __name__ == "__main__":
    main()
