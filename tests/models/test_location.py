"""Names of models: the embedded one, directories, ids on the hub, and what is none of them."""

from __future__ import annotations

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from bitwright.core.errors import BitwrightError
from bitwright.models import hub
from bitwright.models.embedded_model import embedded_directory
from bitwright.models.location import resolve_model


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with some models in it, where the hub must not be asked."""
    for name in ("llama-1b", "llama-3b", "models/qwen", "unrelated"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "llama-1b" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)

    def unexpected(*_: Any, **__: Any) -> str:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr(hub, "snapshot_download", unexpected)
    return tmp_path


def refusal(name: str | Path, code: str) -> BitwrightError:
    with pytest.raises(BitwrightError) as caught:
        resolve_model(name)
    assert caught.value.code == code
    assert caught.value.suggestion
    return caught.value


@pytest.mark.parametrize("name", ["demo:", "demo", " demo: "])
def test_the_embedded_model(name: str, here: Path) -> None:
    assert resolve_model(name) == embedded_directory()
    assert (embedded_directory() / "config.json").is_file()


def test_a_directory_called_demo_wins_over_the_bare_word(here: Path) -> None:
    (here / "demo").mkdir()
    assert resolve_model("demo") == Path("demo")
    assert resolve_model("demo:") == embedded_directory()


@pytest.mark.parametrize("name", ["llama-1b", "./llama-1b", "models/qwen", "models/../llama-1b/"])
def test_a_directory(name: str, here: Path) -> None:
    assert resolve_model(name).resolve() == (here / name).resolve()
    assert resolve_model(here / name) == here / name


def test_home_is_expanded(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(here))
    assert resolve_model("~/llama-1b") == here / "llama-1b"


@pytest.mark.parametrize("name", ["./llama-1", "models/qwem", "/nowhere/at/all", "a/b/c", "~/x", "models/"[:-1] + "/x"])
def test_a_path_that_does_not_exist(name: str, here: Path) -> None:
    assert "does not exist" in refusal(name, "BW301").what


def test_the_nearest_siblings_are_named(here: Path) -> None:
    assert "llama-1b" in refusal("./llama-1", "BW301").suggestion
    assert "models/qwen" in refusal("models/qwem", "BW301").suggestion
    assert "unrelated" not in refusal(here / "llama-1", "BW301").suggestion


def test_a_file_is_no_model(here: Path) -> None:
    error = refusal("llama-1b/config.json", "BW301")
    assert "is a file" in error.what
    assert "llama-1b" in error.suggestion


@pytest.mark.parametrize("name", ["", "  ", "demo:other", "x" * 5000, "nul\0byte", "../" * 40 + "none", "ünïcödé/…"])
def test_nonsense(name: str, here: Path) -> None:
    refusal(name, "BW301")


def downloads(monkeypatch: pytest.MonkeyPatch, result: str | Exception) -> list[tuple[str, dict[str, Any]]]:
    calls: list[tuple[str, dict[str, Any]]] = []

    def download(repository: str, **options: Any) -> str:
        calls.append((repository, options))
        if isinstance(result, Exception):
            raise result
        return result

    monkeypatch.setattr(hub, "snapshot_download", download)
    return calls


@pytest.mark.parametrize("name", ["org/model", "gpt2", "Qwen/Qwen2.5-0.5B"])
def test_an_id_is_fetched_without_pickles_or_code(name: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = downloads(monkeypatch, str(here / "llama-1b"))
    assert resolve_model(name) == here / "llama-1b"
    assert [repository for repository, _ in calls] == [name]
    patterns = calls[0][1]["allow_patterns"]
    assert not [pattern for pattern in patterns if pattern.endswith((".bin", ".pt", ".py", "*"))]
    assert "*.safetensors" in patterns


RESPONSE: Any = SimpleNamespace(headers={}, request=None, status_code=404)
HTTP_ERROR = HfHubHTTPError.__mro__[1]  # of whichever library the client uses


@pytest.mark.parametrize(
    ("failure", "code", "says"),
    [
        (RepositoryNotFoundError("404", response=RESPONSE), "BW301", "no model 'llama-1'"),
        (GatedRepoError("403", response=RESPONSE), "BW301", "closed"),
        (HFValidationError("bad"), "BW301", "no model"),
        (LocalEntryNotFoundError("not cached"), "BW504", "could not be fetched"),
        (OfflineModeIsEnabled("offline mode"), "BW504", "could not be fetched"),
        (ConnectionError("refused"), "BW504", "could not be fetched"),
        (HTTP_ERROR("cut off"), "BW504", "could not be fetched"),
        (TimeoutError(), "BW504", "could not be fetched"),
        (OSError(errno.ENOSPC, "No space left on device"), "BW501", "could not be stored"),
        (RuntimeError("Data processing error: No space left on device (os error 28)"), "BW501", "could not be stored"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_failures_of_the_hub(
    failure: Exception, code: str, says: str, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    downloads(monkeypatch, failure)
    error = refusal("llama-1", code)
    assert says in error.what
    if code == "BW501":
        assert error.where == hub.HF_HUB_CACHE and "run the same command again" in error.suggestion
    if type(failure) is RepositoryNotFoundError:
        assert "llama-1b" in error.suggestion


def test_the_real_client_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test session sets the hub's client to its offline mode."""
    monkeypatch.chdir(tmp_path)
    refusal("some-organisation/model-that-is-not-cached", "BW504")
