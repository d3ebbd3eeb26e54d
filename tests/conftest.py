"""What every test shares: where third-party models and texts are, no network, settled random properties."""

from __future__ import annotations

import math
import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# Before anything imports the hub's client: the tests never use a network.
os.environ["HF_HUB_OFFLINE"] = "1"
# A shell that starts a command in the background has it ignore Ctrl-C; the tests of signals need the usual answer.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Before anything imports Triton, where it is installed: the programs for GPUs are interpreted, on CPU tensors.
os.environ["TRITON_INTERPRET"] = "1"
# Before anything imports torch: test processes that run side by side do not spin for each other's cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from bitwright.kernels import native, native_library

MISSING, LEFT_ASIDE = native_library.missing(), "left aside in the tests of everything else"
# Whoever installs bitwright runs these on the native kernels, where they are built: so do their tests.
RUN_AS_SHIPPED = ("engine", "compat/dashinfer", "compat/qwen", "cli/test_chat.py", "cli/test_generation.py")
ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"  # third-party models and texts lie beside the repository, and may be absent

# The same examples on every run; `pytest --hypothesis-profile=explore` looks for new ones.
QUIET = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("settled", deadline=None, derandomize=True, suppress_health_check=QUIET)
settings.register_profile("explore", deadline=None, print_blob=True, suppress_health_check=QUIET)
settings.load_profile("settled")


@pytest.fixture(scope="session")
def shared_models() -> Path:
    """The folder of third-party trained models; the test is skipped where it is absent."""
    return _present(SHARED / "models")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of third-party texts; the test is skipped where it is absent."""
    return _present(SHARED / "data")


def _present(folder: Path) -> Path:
    if not folder.is_dir():
        pytest.skip(f"no third-party material: {folder.name} is looked for in a folder 'shared' beside the repository")
    return folder


@pytest.fixture(autouse=True, scope="session")
def _private_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test, and no fixture of a module, reads or fills the user's own cache of reference logits."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BITWRIGHT_CACHE", str(tmp_path_factory.getbasetemp() / "bitwright-cache"))
        patch.delenv("BITWRIGHT_CACHE_LIMIT", raising=False)
        yield


@pytest.fixture(autouse=True, scope="session")
def _reference_kernels() -> Iterator[None]:
    """What is neither about the native kernels nor about the engine is tested on the reference, alike anywhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native_library, "_MISSING", LEFT_ASIDE)
        yield


@pytest.fixture(autouse=True, scope="module")
def _native_kernels(request: pytest.FixtureRequest) -> Iterator[None]:
    """Their own tests have them, and those of the engine, for layers of any size; before a fixture of the module."""
    with pytest.MonkeyPatch.context() as patch:
        file = request.path.relative_to(ROOT / "tests")
        if "native" in file.stem or any(file.is_relative_to(place) for place in RUN_AS_SHIPPED):
            patch.setattr(native_library, "_MISSING", MISSING)
            patch.setattr(native, "MOST_PADDING", math.inf)
        yield


@pytest.fixture(params=["native", "reference"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both in turn, for a test whose law each has to keep; the first is skipped where they are not built."""
    if request.param == "native" and MISSING is not None:
        pytest.skip(MISSING)
    monkeypatch.setattr(native_library, "_MISSING", MISSING if request.param == "native" else LEFT_ASIDE)
    return str(request.param)


@pytest.fixture(autouse=True, scope="session")
def _no_network() -> Iterator[None]:
    """A connection to another machine fails the test that tries it."""
    connect = socket.socket.connect

    def refuse(self: socket.socket, address: object) -> None:
        if self.family != socket.AF_UNIX and not str(address).startswith("('127.0.0.1'"):
            raise AssertionError(f"a test tried to reach {address}")
        connect(self, address)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(params=native_library.instruction_sets() or ["none"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set of this processor in turn, as the native kernels' tests ask for it."""
    before = native_library.instruction_set()
    native_library.use_instruction_set(request.param)
    yield request.param
    native_library.use_instruction_set(before)
