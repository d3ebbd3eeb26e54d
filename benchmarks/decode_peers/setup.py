"""Makes an environment for each peer of the decoding benchmark, away from the repository and from bitwright's own.

    python -m benchmarks.decode_peers.setup --work-dir DIR [NAME ...]

What a peer compiles is compiled for this machine's processor.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import venv
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent / "requirements"
NAMES = tuple(sorted(path.stem for path in REQUIREMENTS.glob("*.txt")))
TORCH = "torch==2.13.0"
NATIVE = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF"}
WITHOUT_TORCH = ("llama-cpp",)


def install(name: str, work: Path) -> bool:
    """Whether the environment ``work/name`` is complete."""
    directory = work / name
    if (directory / "complete").is_file():
        return True
    venv.create(directory, with_pip=True, clear=directory.exists())
    constraints = directory / "constraints.txt"
    constraints.write_text(f"{TORCH}\n")
    pip = [str(directory / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    steps = [] if name in WITHOUT_TORCH else [[TORCH]]
    steps.append(["--constraint", str(constraints), "-r", str(REQUIREMENTS / f"{name}.txt")])
    for step in steps:
        if subprocess.run([*pip, *step], check=False, env=os.environ | NATIVE).returncode:
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
