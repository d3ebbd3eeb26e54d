"""Makes an environment for each peer of the decoding benchmark, away from the repository and from bitwright's own.

    python -m benchmarks.decode_peers.setup --work-dir DIR [NAME ...]

What a peer compiles is compiled for this machine's processor.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.setup import TORCH, install_peers

REQUIREMENTS = Path(__file__).resolve().parent / "requirements"
NATIVE = {"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TESTS=OFF"}
WITHOUT_TORCH = ("llama-cpp",)


if __name__ == "__main__":
    install_peers(
        __doc__, REQUIREMENTS, lambda name, file: [*([] if name in WITHOUT_TORCH else [[TORCH]]), file], NATIVE
    )
